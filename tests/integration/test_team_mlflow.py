"""A team's MLflow: a server with logins, PostgreSQL and a bucket. It is killed and comes back while two people train.

Every number and file that a run promises is there once, and nothing is registered twice.
"""

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import mlflow
import pytest
import ray
from support.metrics import step_lines
from support.mlflow_server import MlflowServer
from support.paths import ROOT
from support.postgres import postgres
from support.s3 import s3_store
from support.s3 import settings as s3_settings
from support.workspace import Workspace, arguments

from pipeline import load_detector
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.record import RunRecord, read_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MODEL, EXPERIMENT = "ours", "team"
USERS = {"alice": "alices-9Gq2xkLw", "bob": "bobs-7Tz4mnPv"}
ADMIN, DATABASE_PASSWORD, SERVER_KEY = "admins-5Hd8wrYc", "database-3Vb6jsXe", "key-1Kf0uzQa"
Points = dict[str, dict[str, list[tuple[int, float]]]]
SECRETS = [*USERS.values(), ADMIN, DATABASE_PASSWORD, SERVER_KEY]
RUNS = {"inline": "alice", "tasks": "bob"}  # the run's name, which is where it evaluates, and its user
STEPS, EVAL_STEPS = 24, 12
KILL_STEPS = 6  # both have logged so many when the server is killed
DOWN_SECONDS = 5.0  # at least
AUTH = """
[mlflow]
default_permission = EDIT
database_uri = {database}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


@dataclass(frozen=True)
class Team:
    """What all have in common."""

    server: MlflowServer
    workspace: Workspace
    folder: Path  # of logs and runs
    ray_folder: Path
    down: tuple[float, float]  # when the server was killed, and when it answered again

    def environment(self, user: str, **more: str) -> dict[str, str]:
        return user_environment(self.server.uri, user) | more

    @property
    def client(self) -> Any:
        return mlflow.MlflowClient(self.server.uri, self.server.uri)

    @property
    def records(self) -> dict[str, RunRecord]:
        return {name: read_run(str(self.folder / "runs" / name)) for name in RUNS}


def user_environment(uri: str, user: str) -> dict[str, str]:
    """Of a user's process: it knows the server and a login there, but neither the database nor the bucket."""
    hidden = {*s3_settings(0), "PGPASSWORD", "RAY_ADDRESS"}
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    login = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": USERS[user]}
    return {**kept, **login, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": os.pathsep.join(paths)}


def settings_of(workspace: Workspace, folder: Path, name: str) -> list[str]:
    return arguments(
        {
            **workspace.overrides(name),
            "storage": str(folder / "runs"),
            "tracking.uri": "",
            "tracking.experiment": EXPERIMENT,
            "tracking.register_as": MODEL,
            "tracking.alias": "challenger",
            "train.max_steps": STEPS,
            "train.epochs": STEPS // 6,
            "train.eval_epochs": EVAL_STEPS // 6,
            "evaluation.where": name,
            "scaling.num_workers": 1,
            "seed": len(name),
        }
    )


def command(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    for module, package in (("psycopg", "psycopg[binary]"), ("flask_wtf", "mlflow[auth]")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{package} is not installed (pip install -c constraints.txt '{package}')")
    folder = tmp_path_factory.mktemp("server")
    with postgres(DATABASE_PASSWORD) as database, s3_store() as bucket:
        (folder / "auth.ini").write_text(AUTH.format(database=database))
        login = {"PGPASSWORD": DATABASE_PASSWORD, "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN}
        login |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": SERVER_KEY, "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini")}
        flags = ["--backend-store-uri", database, "--artifacts-destination", f"{bucket}/mlflow", "--serve-artifacts"]
        server = MlflowServer(folder, [*flags, "--app-name", "basic-auth"], {**os.environ, **login})
        try:
            server.start()
            for user, password in USERS.items():
                create_user(server.uri, user, password)
            yield server
        finally:
            server.kill()


def create_user(uri: str, user: str, password: str) -> None:
    token = base64.b64encode(f"admin:{ADMIN}".encode()).decode()
    body = json.dumps({"username": user, "password": password}).encode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{uri}/api/2.0/mlflow/users/create", body, headers)).close()


@pytest.fixture(scope="module")
def ray_folder(server: MlflowServer) -> Iterator[Path]:
    """Of a Ray whose nodes have alice's login, as those of a cluster have one."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: Ray's sockets have at most 107 characters
    environment = user_environment(server.uri, "alice")
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(environment):
            patch.delenv(name)
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI"):
            patch.setenv(name, environment[name])
        patch.setenv("RAY_TMPDIR", str(folder))
        ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="WARNING")
        yield folder
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def team(
    server: MlflowServer, ray_folder: Path, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Team]:
    """After both trainings."""
    folder = tmp_path_factory.mktemp("team")
    address = ray.get_runtime_context().gcs_address
    processes = {}
    for name, user in RUNS.items():
        words = command("jobs.train", "jobs/configs/demo.yaml", *settings_of(workspace, folder, name))
        environment = user_environment(server.uri, user) | {"RAY_ADDRESS": address}
        with (folder / f"{name}.log").open("w") as log:
            processes[name] = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        client = mlflow.MlflowClient(server.uri, server.uri)
        wait_for(processes, folder, 300, lambda: all(logged_steps(client, name) >= KILL_STEPS for name in RUNS))
        server.kill()
        killed, before = time.monotonic(), evaluated(folder)
        # Each run makes an evaluation that the server does not see.
        wait_for(processes, folder, 120, lambda: all(evaluated(folder)[name] > before[name] for name in RUNS))
        time.sleep(max(0.0, killed + DOWN_SECONDS - time.monotonic()))
        server.start()
        down = (killed, time.monotonic())
        for name, process in processes.items():
            assert process.wait(timeout=400) == 0, (folder / f"{name}.log").read_text()
        yield Team(server, workspace, folder, ray_folder, down)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def wait_for(
    processes: Mapping[str, "subprocess.Popen[bytes]"], folder: Path, seconds: float, found: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        for name, process in processes.items():
            assert process.poll() is None, (folder / f"{name}.log").read_text()
        assert time.monotonic() < deadline, "\n".join((folder / f"{name}.log").read_text() for name in processes)
        time.sleep(0.2)


def logged_steps(client: Any, name: str) -> int:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'") if experiment else []
    return len(client.get_metric_history(runs[0].info.run_id, "train/loss")) if runs else 0


def evaluated(folder: Path) -> dict[str, int]:
    return {name: len(list((folder / "runs" / name / "results").glob("step_*.json"))) for name in RUNS}


def test_both_runs_are_finished_and_there_are_no_others(team: Team) -> None:
    assert team.down[1] - team.down[0] > DOWN_SECONDS
    experiment = team.client.get_experiment_by_name(EXPERIMENT)
    runs = {run.info.run_id: run for run in team.client.search_runs([experiment.experiment_id])}
    assert {record.run_id for record in team.records.values()} == set(runs)
    for name, record in team.records.items():
        run = runs[record.run_id]
        assert (run.info.run_name, record.status, run.info.status) == (name, "FINISHED", "FINISHED")
        assert run.data.tags["run_status"] == "FINISHED"
        assert run.data.params["seed"] == str(len(name))


@pytest.fixture(scope="module")
def points(team: Team) -> Points:
    """By run and key, what the server has: steps and values."""
    found: Points = {}
    for name, record in team.records.items():
        keys = team.client.get_run(record.run_id).data.metrics
        histories = {key: team.client.get_metric_history(record.run_id, key) for key in keys}
        found[name] = {key: [(point.step, point.value) for point in history] for key, history in histories.items()}
    return found


def test_every_number_is_there_once(team: Team, points: Points) -> None:
    for name, record in team.records.items():
        histories = points[name]
        for key, history in histories.items():
            assert max(Counter(step for step, _ in history).values()) == 1, (name, key, history)
        lines = [
            json.loads(line)
            for path in sorted(Path(record.folder).glob("steps/*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        assert step_lines(record) == list(range(1, STEPS + 1))
        logged = [key for key in histories if key.startswith(("train/", "lr/")) or key == "epoch"]
        logged += ["perf/images_per_s", "perf/data_wait_share", "perf/step_p50_s", "perf/step_p95_s", "perf/memory_mib"]
        assert {"train/loss", "train/grad_norm", "lr/main"} <= set(logged)
        for key in logged:
            assert sorted(step for step, _ in histories[key]) == list(range(1, STEPS + 1)), (name, key)
        losses = [key for key in lines[0] if f"train/{key}" in histories]
        assert len(losses) > 3
        for loss in losses:
            expected = {line["step"]: pytest.approx(line[loss], rel=1e-5, abs=1e-6) for line in lines}
            assert dict(histories[f"train/{loss}"]) == expected, (name, loss)


def test_every_evaluation_is_there_once(team: Team, points: Points) -> None:
    steps = list(range(EVAL_STEPS, STEPS + 1, EVAL_STEPS))
    for run_name, record in team.records.items():
        histories = points[run_name]
        rows = read_evaluations(record.folder)
        assert [row.entry["step"] for row in rows] == steps
        for name in set(rows[0].entry) - {"epoch", "step"}:
            assert dict(histories[f"val/{name}"]) == {row.entry["step"]: row.entry[name] for row in rows}, name
        for key in (*(key for key in histories if key.startswith("val/AP_class/")), "val/AP_best", "val/seconds"):
            assert sorted(step for step, _ in histories[key]) == steps, (record.name, key)


def test_every_file_is_in_the_bucket(team: Team) -> None:
    names = {f"epoch_{step // 6 - 1:03d}" for step in range(EVAL_STEPS, STEPS + 1, EVAL_STEPS)}
    stored = fsspec.filesystem("s3").find("bucket/mlflow")
    for record in team.records.values():
        files = {path.partition(f"/{record.run_id}/artifacts/")[2] for path in stored if record.run_id in path}
        assert {"config.yaml", "checkpoints.json", "plots/convergence.png", "analysis/index.html"} <= files
        for name in names:
            assert {f"results/{name}.json", f"results/{name}_categories.json"} <= files, sorted(files)
            assert f"plots/precision_recall_{name}.png" in files
            assert any(file.startswith(f"detections/{name}/") for file in files)
        listed = json.loads(fetch(team, record, "checkpoints.json"))
        assert {row["path"] for row in listed} == {str(path) for path in Path(record.folder).glob("checkpoint_*/")}


def fetch(team: Team, record: RunRecord, file: str) -> bytes:
    return Path(team.client.download_artifacts(record.run_id, file)).read_bytes()


def test_each_run_is_one_version(team: Team) -> None:
    versions = {int(found.version): found for found in team.client.search_model_versions(f"name='{MODEL}'")}
    assert sorted(versions) == [1, 2]
    assert {found.tags["run"] for found in versions.values()} == set(RUNS)
    assert all(found.run_id == team.records[found.tags["run"]].run_id for found in versions.values())
    assert list(team.client.get_registered_model(MODEL).aliases) == ["challenger"]
    experiment = team.client.get_experiment_by_name(EXPERIMENT)
    models = team.client.search_logged_models([experiment.experiment_id])
    assert [str(model.status) for model in models] == ["READY", "READY"]


def test_models_and_detector_come_through_the_server(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(run(team, "bob", command("jobs.models", MODEL, "--json")).stdout)
    assert sorted(row["version"] for row in rows) in ([1, 2], ["1", "2"])
    assert {row["run"] for row in rows} == set(RUNS)
    assert all(row["bytes"] > 0 for row in rows)
    image = next((team.workspace.folder / "raw/val/images").glob("*.jpg"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.server.uri)
    for number in (1, 2):
        found = load_detector(f"models:/{MODEL}/{number}", device="cpu")(image, threshold=0.0)
        assert len(found.scores)


def test_promotion_reads_and_keeps_results_through_the_server(team: Team) -> None:
    first = run(team, "alice", command("jobs.promote", MODEL, "--from", "1", "--json", "-"))
    assert json.loads(first.stdout)["verdict"] == "promoted"
    second = run(team, "bob", command("jobs.promote", MODEL, "--from", "2", "--json", "-"), codes=(0, 3))
    verdict = json.loads(second.stdout)
    assert verdict["verdict"] == ("refused" if second.returncode else "promoted")
    assert verdict["data"]["images"] == 12
    champion = team.client.get_registered_model(MODEL).aliases["champion"]
    assert str(champion) == ("1" if second.returncode else "2")
    stored = fsspec.filesystem("s3").find("bucket/mlflow")
    for record in team.records.values():
        kept = [path for path in stored if f"{record.run_id}/artifacts/promotion/results/" in path]
        assert len(kept) == 2, kept  # the detections, and their record


def test_wrong_password_ends_before_ray_starts(team: Team, tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    try:
        wrong = {"MLFLOW_TRACKING_PASSWORD": "wrong-0Nc5ptRd", "RAY_TMPDIR": str(folder)}
        words = command("jobs.train", "jobs/configs/demo.yaml", *settings_of(team.workspace, tmp_path, "inline"))
        done = run(team, "alice", words, codes=(2,), **wrong)
        assert "MLFLOW_TRACKING_PASSWORD" in done.stderr
        assert team.server.uri in done.stderr
        assert wrong["MLFLOW_TRACKING_PASSWORD"] not in done.stdout + done.stderr
        assert list(folder.iterdir()) == []
        assert list(tmp_path.iterdir()) == []
    finally:
        shutil.rmtree(folder)


def test_no_password_is_stored_or_printed(team: Team) -> None:
    """In no log, record, checkpoint or file of Ray, and in no artifact."""
    folders = (team.folder, team.ray_folder, team.server.log.parent, team.workspace.folder)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {"run.json", "state.json", "server.log", "inline.log", "raylet.out"} <= {path.name for path in files}
    assert [path for path in files if holds_secret(path.read_bytes())] == []
    bucket = fsspec.filesystem("s3")
    assert [path for path in bucket.find("bucket") if holds_secret(bucket.cat_file(path))] == []


def holds_secret(content: bytes) -> bool:
    return any(secret.encode() in content for secret in SECRETS)


def run(
    team: Team, user: str, words: list[str], codes: tuple[int, ...] = (0,), **more: str
) -> "subprocess.CompletedProcess[str]":
    environment = team.environment(user, **more)
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in codes, done.stdout + done.stderr
    return done
