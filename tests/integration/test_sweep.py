"""Real sweeps: Ray Tune over whole Ray Train runs, nested MLflow runs, kills, and the resources of a stopped trial.

`tests/tune/trials/test_state.py` kills sweeps at every moment without Ray.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import ray
import yaml
from support.paths import ROOT
from support.sweep_process import SweepProcess, in_second_trial
from support.workspace import Workspace

from pipeline.config import load_config
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.record import read_run

pytestmark = pytest.mark.ray
TINY = {
    "data.train": "shards",
    "data.val": "shards",
    "train.epochs": 2,
    "train.eval_epochs": 1,
    "model.enc_layers": 1,
    "model.dec_layers": 1,
    "model.hidden_dim": 32,
    "model.backbone.width": 8,
    "scaling.num_workers": 1,
}
# A sweep whose trials report made-up numbers instead of training, so that it is known which ones Ray must stop. Trials
# with a learning rate above 1 fail: 2 with an error, 3 because their process dies at the first start.
MADE_UP = """
import dataclasses, json, os, sys, time
import ray, ray.train
from ray.train.torch import TorchTrainer
from pipeline.errors import NonFiniteError
from pipeline.launch.cluster import start_ray
from pipeline.config import dump
from pipeline.runs.record import RunRecord, read_run, run_exists, write_run
from tune.load import load_space
from tune.results.outcomes import outcomes_of
from tune.search.ledger import new_ledger
from tune.trials import run as trials

def worker(config):
    for epoch in range(1, config["train"]["epochs"] + 1):
        ray.train.report({"val/AP": config["optim"]["lr"], "val/epoch": epoch - 1, "val/step": epoch})
        time.sleep(1)

def train(config, *, resume, parent_run_id, callbacks, patience):
    folder = f"{config.storage}/{config.name}"
    again = run_exists(folder)
    write_run(RunRecord(config.name, folder, dump(config)))
    if config.optim.lr == 2:
        raise NonFiniteError("the loss is NaN")
    if config.optim.lr == 3 and not again:
        os._exit(1)
    scaling = config.scaling
    resources = {"CPU": scaling.cpus_per_worker}
    scaling = ray.train.ScalingConfig(num_workers=scaling.num_workers, resources_per_worker=resources)
    settings = ray.train.RunConfig(name=config.name, storage_path=config.storage, callbacks=list(callbacks))
    TorchTrainer(worker, train_loop_config=dump(config), scaling_config=scaling, run_config=settings).fit()
    write_run(dataclasses.replace(read_run(folder), status="FINISHED"))

space = load_space("space.yaml")
start_ray()
total = ray.cluster_resources()["CPU"]
fit = trials.concurrent_trials([node["Resources"] for node in ray.nodes()], space.base.scaling)
space = dataclasses.replace(space, search=space.search.model_copy(update={"concurrent": fit}))
ledger = trials.run_trials(space, new_ledger(space, {}), None, train)
outcomes = outcomes_of(space, ledger)
deadline = time.monotonic() + 60
while ray.available_resources().get("CPU", 0) < total and time.monotonic() < deadline:
    time.sleep(1)
free = ray.available_resources().get("CPU", 0)
print("RESULT" + json.dumps([total, free, [dataclasses.asdict(outcome) for outcome in outcomes]]))
"""


@pytest.fixture
def other_ray() -> Iterator[None]:
    """Another Ray on this machine, as a colleague's job would start it."""
    code = "import ray, sys; ray.init(num_cpus=0, include_dashboard=False); print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"up"
    yield
    process.communicate(timeout=60)  # closes its standard input, which ends it


def run(folder: Path, *command: str) -> str:
    """Run Python in `folder`, as a user would: relative paths mean this folder, in every trial and worker too."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def write_space(folder: Path, **space: object) -> None:
    (folder / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))


@pytest.mark.slow
@pytest.mark.usefixtures("other_ray")
def test_stopped_trial_releases_its_resources(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("{}")
    write_space(
        tmp_path,
        config="base.yaml",
        # one trial fills the machine: the next one starts only if all of it comes back
        overrides={"storage": str(tmp_path / "runs"), "train.epochs": 9, "scaling.cpus_per_worker": os.cpu_count()},
        search={"method": "asha", "samples": 1, "grace": 1, "reduction": 2},
        space={"optim.lr": {"grid": [0.3, 0.1, 0.2, 0.4]}},
    )
    (tmp_path / "sweep.py").write_text(MADE_UP)
    output = run(tmp_path, "sweep.py")
    total, free, outcomes = json.loads(output.partition("RESULT")[2])
    assert free == total
    assert [(outcome["values"]["optim.lr"], outcome["status"], outcome["score"]) for outcome in outcomes] == [
        (0.3, "finished", 0.3),
        (0.1, "stopped early", 0.1),
        (0.2, "stopped early", 0.2),
        (0.4, "finished", 0.4),
    ]
    assert [outcome["epochs"] for outcome in outcomes][::3] == [9, 9]
    assert all(1 <= outcome["epochs"] < 9 for outcome in outcomes[1:3])
    records = [read_run(str(tmp_path / "runs" / outcome["name"])) for outcome in outcomes]
    assert [record.status for record in records] == ["FINISHED", "KILLED", "KILLED", "FINISHED"]


@pytest.mark.slow
def test_failed_trials_are_marked_and_tried_again_and_the_others_continue(tmp_path: Path) -> None:
    """Trials of two workers on fractions of a CPU, more than fit, of which one fails and one dies."""
    (tmp_path / "base.yaml").write_text("{}")
    write_space(
        tmp_path,
        config="base.yaml",
        overrides={
            "storage": str(tmp_path / "runs"),
            "train.epochs": 2,
            "scaling.num_workers": 2,
            "scaling.cpus_per_worker": os.cpu_count() / 4,  # type: ignore[operator]
            "scaling.use_gpu": False,
        },
        search={"sampler": "grid"},
        space={"optim.lr": {"grid": [0.3, 2, 0.1, 3, 0.2]}},
    )
    (tmp_path / "sweep.py").write_text(MADE_UP)
    total, free, outcomes = json.loads(run(tmp_path, "sweep.py").partition("RESULT")[2])
    assert free == total
    assert [(each["values"]["optim.lr"], each["status"], each["score"], each["error"]) for each in outcomes] == [
        (0.3, "finished", 0.3, ""),
        (2, "failed", None, "the loss is NaN"),
        (0.1, "finished", 0.1, ""),
        (3, "finished", 3.0, ""),
        (0.2, "finished", 0.2, ""),
    ]
    ledger = json.loads((tmp_path / "runs/sweep.json").read_text())
    assert [each["failures"] for each in ledger["trials"]] == [0, 2, 0, 1, 0]
    assert "driver died" in ledger["trials"][3]["error"]


@pytest.mark.slow
def test_sweep_runs_trials_and_reports_the_best(tmp_path: Path) -> None:
    annotations, images = write_synthetic(tmp_path / "raw", images=16, seed=0, size=96)
    build_shards(annotations, images, tmp_path / "shards")
    write_space(
        tmp_path,
        config=str(ROOT / "jobs/configs/demo.yaml"),
        overrides={"name": "sweep", **TINY},
        search={"method": "grid"},
        space={"optim.lr": {"grid": [1e-3, 1e-8]}, "model.enc_points, model.dec_points": {"grid": [2]}},
    )
    output = run(tmp_path, "-m", "tune.sweep", "space.yaml")
    assert "python -m jobs.train" in output

    records = [read_run(str(path.parent)) for path in sorted((tmp_path / "runs/sweep").glob("sweep-*/run.json"))]
    assert [record.config["optim"]["lr"] for record in records] == [1e-3, 1e-8]
    assert [record.status for record in records] == ["FINISHED", "FINISHED"]
    assert records[0].config["model"]["enc_points"] == records[0].config["model"]["dec_points"] == 2

    best = load_config(tmp_path / "runs/sweep/best.yaml")
    assert best.optim.lr in (1e-3, 1e-8)
    assert best.name == "sweep-best"
    assert best.tracking.register_as == "deformable-detr-demo"

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    (parent,) = [run for run in runs if run.data.tags["mlflow.runName"] == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_id for run in children} == {record.run_id for record in records}
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"best.yaml", "trials.txt"}
    scores = [point.value for run in children for point in client.get_metric_history(run.info.run_id, "val/AP")]
    assert len(scores) == 4  # two epochs of two trials, each logged once
    assert parent.data.metrics["val/AP"] == pytest.approx(max(scores))
    assert not client.search_registered_models()  # trials register nothing

    page = tmp_path / "runs/sweep/report/index.html"
    assert f"page: {page}" in output
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "report")} >= {"report/index.html"}
    page.unlink()
    output = run(tmp_path, "-m", "tune.report", "sweep", "--register")
    assert page.exists()
    version = client.get_model_version_by_alias("deformable-detr-demo", "challenger")
    (best_trial,) = [run for run in children if run.info.run_id == version.run_id]
    assert max(point.value for point in client.get_metric_history(best_trial.info.run_id, "val/AP")) == max(scores)
    assert f"models:/deformable-detr-demo/{version.version}" in output
    logged = client.get_run(best_trial.info.run_id).data.metrics
    assert {"model/parameters", "model/multiply_adds", "perf/epoch_s"} <= logged.keys()


@pytest.mark.usefixtures("ray_two_cpus")
def test_sweep_continues_after_its_driver_was_killed(workspace: Workspace) -> None:
    """Two trials that differ in nothing that moves numbers: the second one is killed, the first one is not."""
    address = ray.get_runtime_context().gcs_address
    search, space = {"sampler": "grid", "concurrent": 1}, {"train.log_steps": {"grid": [1, 2]}}
    sweep = SweepProcess(workspace, "killed-sweep", address, search, space, train__epochs=3, train__eval_epochs=1)
    sweep.start()
    sweep.wait(in_second_trial)
    sweep.kill()
    before, first = sweep.ledger, sweep.folder / "killed-sweep-000"
    left = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    assert [trial.status for trial in before.trials] == ["finished", "running"]

    sweep.start("--resume")
    ledger = sweep.finish()
    assert [(trial.name, trial.values, trial.status, trial.failures) for trial in ledger.trials] == [
        ("killed-sweep-000", {"train.log_steps": 1}, "finished", 0),
        ("killed-sweep-001", {"train.log_steps": 2}, "finished", 0),
    ]
    assert {path: path.stat().st_mtime_ns for path in left if path.exists()} == {
        path: time for path, time in left.items() if path.exists()
    }
    assert sweep.scores("killed-sweep-000") == sweep.scores("killed-sweep-001")
    assert sweep.weights("killed-sweep-000") == sweep.weights("killed-sweep-001")
    assert ledger.reports[: len(before.reports)] == before.reports

    client = mlflow.MlflowClient(workspace.tracking_uri)
    assert ledger.run_id == before.run_id
    parent = client.get_run(ledger.run_id or "")
    tag = f"tags.`mlflow.parentRunId` = '{ledger.run_id}'"
    children = client.search_runs([parent.info.experiment_id], tag)
    assert {run.info.run_id for run in children} == {sweep.run_id(trial.name) for trial in ledger.trials}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    for run in children:
        points = client.get_metric_history(run.info.run_id, "val/AP")
        assert [point.step for point in points] == [6, 12, 18]
    assert load_config(sweep.folder / "best.yaml").name == "killed-sweep-best"
    assert "killed-sweep-001" in (sweep.folder / "report/index.html").read_text("utf-8")
    assert client.list_artifacts(ledger.run_id or "", "report")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_two_cpus")
def test_pbt_hands_over_the_checkpoint_and_changes_the_values(workspace: Workspace) -> None:
    address = ray.get_runtime_context().gcs_address
    search = {"scheduler": "pbt", "samples": 2, "quantile": 0.5, "concurrent": 2}
    space = {"optim.lr": {"loguniform": [1e-5, 1e-3]}}
    sweep = SweepProcess(workspace, "population", address, search, space, train__epochs=2, train__eval_epochs=1)
    sweep.start()
    ledger = sweep.finish()
    (made,) = ledger.exchanges
    donor, taker = (read_evaluations(str(sweep.folder / name)) for name in (made.donor, made.trial))
    assert made.epoch == 1
    assert taker[0] == donor[0]  # also the checkpoint's name, half of which is random
    assert len(taker) == len(donor) == 2
    assert {trial.status for trial in ledger.trials} == {"finished"}
    record = read_run(str(sweep.folder / made.trial))
    assert record.config["optim"]["lr"] == made.values["optim.lr"] == ledger.trial(made.trial).values["optim.lr"]
    assert record.config["train"]["epochs"] == 2
    assert f"{made.trial} continued from {made.donor}" in sweep.said
