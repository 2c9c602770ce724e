"""MLflow runs: one per training run, no step twice, and a dead server costs seconds and one warning."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.helpers import tiny_config, tiny_run
from support.mlflow_server import MlflowServer

from pipeline.checkpoint import load_inference
from pipeline.config import Config, TrackingConfig, flatten, from_dict
from pipeline.errors import ConfigError, InputError, TrackingError, TrackingInputError
from pipeline.registry.register import register, resolve
from pipeline.tracking.client import connect
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.run import check_experiment, finish_run, resume_tags, start_run
from pipeline.tracking.store import TrackingStore, resolve_uri


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    folder = tmp_path_factory.mktemp("a folder")  # with a space, as users have
    return TrackingConfig(uri=f"sqlite:///{folder}/new/mlflow.db", experiment="tests")


@pytest.fixture(scope="module")
def client(tracking: TrackingConfig) -> Any:
    return connect(tracking.uri, create=True)


@pytest.fixture
def run_id(tracking: TrackingConfig) -> str:
    run_id = start_run(tracking, Config(tracking=tracking), "a-run", tags={"data.digest": "abc"})
    assert run_id is not None
    return run_id


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """Answers its health page, then nothing any more."""
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/health":
                release.wait(30)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    release.set()
    server.shutdown()
    server.server_close()


def steps(client: Any, run_id: str, key: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, key)]


def test_start_run_logs_the_flattened_config(client: Any, run_id: str) -> None:
    run = client.get_run(run_id)
    assert set(run.data.params) == set(flatten(Config()))
    assert json.loads(run.data.params["optim.lr"]) == Config().optim.lr
    assert json.loads(run.data.params["data.augment.scales"]) == list(Config().data.augment.scales)
    assert run.info.run_name == "a-run"
    assert run.info.status == "RUNNING"
    assert run.data.tags["data.digest"] == "abc"


def test_start_run_stores_files_beside_the_database(client: Any, tracking: TrackingConfig, run_id: str) -> None:
    with RunLogger(tracking.uri, run_id) as log:
        log.text("index", "data/digest.txt")
    root = Path(tracking.uri.removeprefix("sqlite:///")).parent
    assert [path.read_text() for path in root.glob(f"mlartifacts/{run_id}/**/digest.txt")] == ["index"]


def test_restart_logs_no_step_twice(client: Any, tracking: TrackingConfig, run_id: str) -> None:
    with RunLogger(tracking.uri, run_id) as log:
        for step in (10, 20, 30):
            log.metrics({"train/loss": 1.0 / step}, step)
        log.metrics({"val/AP": 0.1}, 20)
    # the worker died at step 30, before it had logged the AP of that step, and starts again from step 20
    resumed = start_run(tracking, Config(tracking=tracking), "a-run", resume_run_id=run_id)
    assert resumed == run_id
    with RunLogger(tracking.uri, run_id) as log:
        log.metrics({"train/loss": 1.0, "val/AP": 0.2}, 30)
        log.metrics({"train/loss": 0.5, "train/lr": 1e-4}, 40)
    assert steps(client, run_id, "train/loss") == [10, 20, 30, 40]
    assert steps(client, run_id, "val/AP") == [20, 30]
    assert steps(client, run_id, "train/lr") == [40]


def test_resume_reopens_the_run_and_notes_what_changed(client: Any, tracking: TrackingConfig, run_id: str) -> None:
    finish_run(tracking.uri, run_id, "FAILED")
    assert client.get_run(run_id).info.status == "FAILED"
    config = from_dict({"train": {"epochs": 99}, "tracking": tracking.model_dump()})
    assert start_run(tracking, config, "a-run", resume_run_id=run_id) == run_id
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["train.epochs"] == str(Config().train.epochs)
    assert json.loads(run.data.tags["resumed_with.1"]) == {"train.epochs": "99"}


def test_start_run_sets_the_status_tag_of_each_start(client: Any, tracking: TrackingConfig, run_id: str) -> None:
    def tag() -> str:
        return str(client.get_run(run_id).data.tags["run_status"])

    assert tag() == "RUNNING"
    for status in ("PREEMPTED", "FAILED", "KILLED", "FINISHED"):
        finish_run(tracking.uri, run_id, status)
        assert tag() == status
        start_run(tracking, Config(tracking=tracking), "a-run", resume_run_id=run_id)
        assert tag() == "RUNNING"
        assert client.get_run(run_id).info.status == "RUNNING"


def test_start_run_keeps_the_settings_of_every_resume(client: Any, tracking: TrackingConfig, run_id: str) -> None:
    first = Config().train.epochs
    for epochs in (99, 99, 120, first, first, 99):  # a retry has the settings of the start before
        config = from_dict({"train": {"epochs": epochs}, "tracking": tracking.model_dump()})
        start_run(tracking, config, "a-run", resume_run_id=run_id)
    tags = client.get_run(run_id).data.tags
    found = {key: json.loads(value) for key, value in tags.items() if key.startswith("resumed_with")}
    assert found == {
        "resumed_with.1": {"train.epochs": "99"},
        "resumed_with.2": {"train.epochs": "120"},
        "resumed_with.3": {},
        "resumed_with.4": {"train.epochs": "99"},
    }


@pytest.mark.parametrize(
    ("tags", "changed", "new"),
    [
        ({}, {}, {}),
        ({}, {"seed": "7"}, {"resumed_with.1": '{"seed": "7"}'}),
        ({"resumed_with": '{"seed": "7"}'}, {"seed": "7"}, {}),  # of version 0.1
        ({"resumed_with": '{"seed": "7"}'}, {"seed": "8"}, {"resumed_with.1": '{"seed": "8"}'}),
        ({"resumed_with": '{"seed": "7"}'}, {}, {"resumed_with.1": "{}"}),
        ({f"resumed_with.{n}": "{}" for n in range(1, 11)}, {"seed": "8"}, {"resumed_with.11": '{"seed": "8"}'}),
        ({"resumed_with.1": '{"b": "1", "a": "2"}'}, {"a": "2", "b": "1"}, {}),
    ],
)
def test_resume_tags_add_to_the_history(tags: dict[str, str], changed: dict[str, str], new: dict[str, str]) -> None:
    assert resume_tags(tags, changed) == new


def test_resume_of_a_deleted_run_starts_a_new_one(
    client: Any, tracking: TrackingConfig, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    client.delete_run(run_id)
    for gone in (run_id, "0" * 32):
        fresh = start_run(tracking, Config(tracking=tracking), "a-run", resume_run_id=gone)
        assert fresh not in (None, gone)
    assert len(caplog.records) == 2


def test_child_names_its_parent(client: Any, tracking: TrackingConfig, run_id: str) -> None:
    child = start_run(tracking, Config(tracking=tracking), "trial", parent_run_id=run_id)
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == run_id


def test_logger_accepts_artifacts_and_special_numbers(
    client: Any, tracking: TrackingConfig, run_id: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.json").write_text("{}")
    with RunLogger(tracking.uri, run_id) as log:
        log.artifact(tmp_path / "folder" / "one.json", "results")
        log.artifact(tmp_path / "folder", "copy")
        (tmp_path / "folder" / "one.json").unlink()  # a caller's temporary file goes before the thread comes to it
        log.metrics({"nan": float("nan"), "inf": float("inf")}, 1)
    assert [file.path for file in client.list_artifacts(run_id, "results")] == ["results/one.json"]
    assert [file.path for file in client.list_artifacts(run_id, "copy")] == ["copy/one.json"]
    assert steps(client, run_id, "nan") == [1]


def test_logger_failures_warn_once(
    client: Any, tracking: TrackingConfig, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunLogger(tracking.uri, run_id) as log:
        log.text("up and out", "../../outside.txt")  # MLflow refuses it
        log.metrics({"word": "no number"}, 1)  # type: ignore[dict-item]  # what a bug would hand over
        log.artifact(tmp_path / "absent-too.json")
        log.metrics({"train/loss": 1.0}, 1)
    assert steps(client, run_id, "train/loss") == [1]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "1 of 2 records" in messages[1]


def test_logger_without_run_does_nothing(tmp_path: Path) -> None:
    with RunLogger(f"sqlite:///{tmp_path}/none.db", None) as log:
        log.metrics({"train/loss": 1.0}, 1)
        assert log.flush()
    finish_run(f"sqlite:///{tmp_path}/none.db", None, "FINISHED")
    assert not list(tmp_path.iterdir())


def test_worker_makes_no_database_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunLogger(f"sqlite:///{tmp_path}/elsewhere.db", "0" * 32) as log:
        log.metrics({"train/loss": 1.0}, 1)
    assert not list(tmp_path.iterdir())
    assert "MLflow server" in caplog.records[0].getMessage()


def test_dead_server_is_noticed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dead = TrackingConfig(uri=f"http://127.0.0.1:{port}")
    began = time.monotonic()
    assert start_run(dead, Config(tracking=dead), "a-run") is None
    assert time.monotonic() - began < 5
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "training continues" in record.getMessage()


def test_silent_server_is_noticed_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.client.PROBE_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TrackingError, match=f"http://127.0.0.1:{silent.getsockname()[1]}"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_server_that_hangs_later_does_not_stall_training(hanging_server: str, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    log = RunLogger(hanging_server, "0" * 32)
    for step in range(20_000):
        log.metrics({"train/loss": 1.0}, step)
    assert not log.flush(0.3)
    assert not log.flush()  # known to hang: no second wait
    log.close()
    assert time.monotonic() - began < 5
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "20000 of 20000 records" in messages[1]


@pytest.fixture
def refusing_server() -> Iterator[tuple[str, list[int]]]:
    """Healthy, but answers every request with the status in the list."""
    status = [401]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else status[0])
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", status
    server.shutdown()
    server.server_close()


def test_deleted_experiment_is_refused_before_the_start(client: Any, tracking: TrackingConfig) -> None:
    deleted = tracking.model_copy(update={"experiment": "deleted"})
    client.delete_experiment(client.create_experiment("deleted"))
    runs = len(client.search_runs([e.experiment_id for e in client.search_experiments()]))
    for refused in (
        lambda: check_experiment(TrackingStore(deleted.uri), deleted.experiment),
        lambda: start_run(deleted, Config(tracking=deleted), "a-run"),
    ):
        with pytest.raises(InputError, match=r"tracking\.experiment: deleted .*mlflow experiments restore"):
            refused()
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == runs


def test_experiment_that_mlflow_cannot_take_is_refused(tracking: TrackingConfig) -> None:
    empty = tracking.model_copy(update={"experiment": ""})  # a config refuses it, another MLflow may refuse more
    with pytest.raises(InputError, match=empty.uri):
        start_run(empty, Config(), "a-run")


def test_check_of_a_new_store_makes_nothing(tmp_path: Path) -> None:
    check_experiment(TrackingStore(f"sqlite:///{tmp_path}/new/mlflow.db"), "tests")
    assert not list(tmp_path.iterdir())


def test_check_of_a_store_that_cannot_be_made_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrackingInputError, match=r"tracking\.uri"):
        check_experiment(TrackingStore(f"sqlite:///{tmp_path}/file/runs/mlflow.db"), "tests")
    monkeypatch.setattr("pipeline.tracking.database.os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(TrackingInputError, match=f"{tmp_path}/new"):
        check_experiment(TrackingStore(f"sqlite:///{tmp_path}/new/mlflow.db"), "tests")


@pytest.mark.parametrize(("answer", "refused"), [(401, True), (403, True), (400, True), (500, False), (503, False)])
def test_server_that_refuses_is_a_mistake_and_one_that_fails_is_an_outage(
    answer: int,
    refused: bool,
    refusing_server: tuple[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri, status = refusing_server
    status[0] = answer
    tracking = TrackingConfig(uri=uri)
    if not refused:
        check_experiment(TrackingStore(uri), "tests")
        assert start_run(tracking, Config(tracking=tracking), "a-run") is None
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        return
    said = "MLFLOW_TRACKING_USERNAME" if answer in (401, 403) else "refuses"
    with pytest.raises(InputError, match=rf"the default.*{said}"):
        check_experiment(TrackingStore(uri, "the default"), "tests")
    with pytest.raises(InputError):
        start_run(tracking, Config(tracking=tracking), "a-run")


def test_two_first_runs_at_once_share_the_experiment(
    client: Any, tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run creates the experiment between the look and the creation."""
    shared = tracking.model_copy(update={"experiment": "shared"})
    create = type(client).create_experiment

    def late(self: Any, name: str, **arguments: Any) -> str:
        create(self, name, **arguments)
        return str(create(self, name, **arguments))

    monkeypatch.setattr(type(client), "create_experiment", late)
    run_id = start_run(shared, Config(tracking=shared), "a-run")
    assert run_id is not None
    assert client.get_run(run_id).info.experiment_id == client.get_experiment_by_name("shared").experiment_id


@pytest.mark.slow
def test_tracking_on_a_real_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same calls over HTTP; then the server is killed in the middle of a run."""
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    server = MlflowServer(tmp_path, [*store, "--artifacts-destination", str(tmp_path / "files")])
    try:
        server.start()
        config = tiny_config(tracking={"uri": server.uri})
        uri = config.tracking.uri
        client = connect(uri)
        run_id = start_run(config.tracking, config, "remote")
        assert run_id is not None
        for first in (0, 300):
            with RunLogger(uri, run_id) as log:
                for step in range(first, first + 400):
                    log.metrics({"train/loss": 1.0}, step)
        assert steps(client, run_id, "train/loss") == list(range(700))
        record = tiny_run(tmp_path / "run", config, run_id)
        assert register(record, "remote", "champion") == register(record, "remote", "champion") == "1"
        with resolve("models:/remote@champion", uri) as folder:
            assert load_inference(folder).state == load_inference(record.checkpoint).state
        assert not folder.exists()
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        log = RunLogger(uri, run_id)
        assert log.flush()
    finally:
        server.kill()
    began = time.monotonic()
    log.metrics({"train/loss": 1.0}, 700)
    assert not log.flush(1.0)
    log.close()
    finish_run(uri, run_id, "FINISHED")
    assert time.monotonic() - began < 5
    assert not [record for record in caplog.records if record.name.startswith("urllib3")]


def test_relative_sqlite_is_bound_to_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri(f"sqlite:///{tmp_path}/x.db") == f"sqlite:///{tmp_path}/x.db"
    assert resolve_uri("http://host:5000/") == "http://host:5000"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "uri", ["", "runs/mlruns", "file:///tmp/mlruns", "sqlite://", "sqlite:///", "ftp://host", "http://"]
)
def test_resolve_uri_invalid_address_raises(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri"):
        resolve_uri(uri)
