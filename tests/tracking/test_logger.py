"""Records wait for a server that is down; copies of files are always removed: sent, without space, without a server."""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from pipeline.errors import TrackingError
from pipeline.files.scratch import sweep
from pipeline.tracking import logger as module
from pipeline.tracking.logger import RunLogger

SIZE = 1000


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of a test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    path.write_bytes(b"x" * SIZE)
    return path


class Server:
    """MLflow as the logger's thread sees it: it takes nothing until it is released."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.taken: list[str] = []

    def __call__(self, *_: Any) -> "Server":
        self.release.wait(30)
        return self

    def upload(self, file: Any) -> None:
        self.taken.append(file.copy.name)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setattr(module, "connect", lambda uri: None)
    monkeypatch.setattr(module, "_Sink", server)
    yield server
    server.release.set()


class Flaky:
    """MLflow as the logger's thread sees it: down for as many looks as there are errors; files fail with `bad`."""

    def __init__(self, errors: list[Exception], bad: Exception | None = None) -> None:
        self.errors, self.bad = errors, bad
        self.taken: list[object] = []

    def _fail(self) -> None:
        if self.errors:
            raise self.errors[0]

    def answers(self, uri: str) -> bool:
        """Each look brings the end of the outage nearer."""
        if self.errors:
            self.errors.pop()
        return not self.errors

    def connect(self, uri: str) -> None:
        self._fail()

    def write(self, batch: Any) -> None:
        self._fail()
        self.taken += [(record.step, record.timestamp) for record in batch]

    def upload(self, file: Any) -> None:
        self._fail()
        if self.bad:
            raise self.bad
        self.taken.append(file.copy.read_bytes())

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Flaky":
        monkeypatch.setattr(module, "connect", self.connect)
        monkeypatch.setattr(module, "_Sink", lambda *_: self)
        monkeypatch.setattr(module, "answers", self.answers)
        monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)
        return self


def down() -> Exception:
    return TrackingError("does not answer")


def failed_inside() -> Exception:
    """The server answers with status 500."""
    return MlflowException("the bucket is full")


def test_server_down_records_wait_and_are_sent_in_order(
    temporary: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While it connects, and while it writes, more often than a record is tried otherwise."""
    server = Flaky([down() for _ in range(3 * module.ATTEMPTS)]).install(monkeypatch)
    with RunLogger("", "run") as log:
        log.metrics({"train/loss": 1.0}, 1)
        assert log.flush(30)
        server.errors += [failed_inside() for _ in range(3 * module.ATTEMPTS)]
        log.metrics({"train/loss": 1.0}, 2)
        log.artifact(file)
        log.metrics({"train/loss": 1.0}, 3)
        assert log.flush(30)
    steps = [item if isinstance(item, bytes) else item[0] for item in server.taken]  # type: ignore[index]
    assert steps == [1, 2, b"x" * SIZE, 3]
    assert copies(temporary) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_server_comes_back_while_the_run_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Flaky([down() for _ in range(100)]).install(monkeypatch)
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.05)
    log = RunLogger("", "run")
    log.metrics({"train/loss": 1.0}, 1)
    assert not log.flush()
    log.close(30)
    assert [step for step, _ in server.taken] == [1]  # type: ignore[misc]
    assert "were not written" not in caplog.text


def test_server_stays_down_close_gives_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    server = Flaky([down() for _ in range(10_000)]).install(monkeypatch)
    log = RunLogger("", "run")
    log.metrics({"train/loss": 1.0}, 1)
    log.close(0.2)
    assert server.taken == []
    assert "1 of 1 records" in caplog.text
    assert "training" not in caplog.text  # reports and registrations log, too


def test_server_answers_but_fails_on_a_file_others_are_sent(
    temporary: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Flaky([], bad=failed_inside()).install(monkeypatch)
    with RunLogger("", "run") as log:
        log.artifact(file)
        log.metrics({"train/loss": 1.0}, 1)
        assert not log.flush(30)
    assert [step for step, _ in server.taken] == [1]  # type: ignore[misc]
    assert copies(temporary) == []
    assert "1 of 2 records" in caplog.text


def copies(temporary: Path) -> list[Path]:
    return [path for path in temporary.rglob("*") if path.is_file()]


def test_file_sent_copy_gone_before_the_end(hanging: Server, temporary: Path, file: Path, tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "file").write_bytes(b"")
    hanging.release.set()
    log = RunLogger("", "run")
    log.artifact(file, "results")
    log.artifact(tmp_path / "folder")
    assert log.flush(30)
    assert hanging.taken == ["results.json", "folder"]
    assert copies(temporary) == []
    log.close()
    assert list(temporary.iterdir()) == []


def test_queue_full_copy_gone(
    hanging: Server, temporary: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "QUEUE_RECORDS", 3)
    log = RunLogger("", "run")
    for _ in range(20):
        log.artifact(file)
    assert len(copies(temporary)) <= 3 + 3, "those in the queue, and those that the thread has taken from it"
    assert not log.flush(0.2)
    log.close()
    assert list(temporary.iterdir()) == []
    assert "20 of 20 records" in caplog.text


def test_too_many_bytes_wait_copy_refused_with_a_warning(
    hanging: Server, temporary: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SPOOL_BYTES", 2 * SIZE + 1)
    log = RunLogger("", "run")
    for _ in range(5):
        log.artifact(file)
    assert len(copies(temporary)) == 2
    assert "wait for the server" in caplog.text
    hanging.release.set()
    assert log.flush(30)
    log.artifact(file)
    assert log.flush(30)
    assert len(hanging.taken) == 3
    log.close()


def test_server_hangs_close_removes_copies(hanging: Server, temporary: Path, file: Path) -> None:
    with RunLogger("", "run") as log:
        log.artifact(file)
        assert len(copies(temporary)) == 1
        assert not log.flush(0.2)
    assert list(temporary.iterdir()) == []


def test_server_refuses_copy_gone(temporary: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(uri: str) -> None:
        raise RuntimeError("no such run")

    monkeypatch.setattr(module, "connect", refuse)
    log = RunLogger("", "run")
    log.artifact(file)
    assert not log.flush(30)
    assert copies(temporary) == []
    log.close()


def test_source_missing_nothing_is_left(hanging: Server, temporary: Path, tmp_path: Path) -> None:
    log = RunLogger("", "run")
    log.artifact(tmp_path / "absent")
    assert copies(temporary) == []
    log.close()
    assert list(temporary.iterdir()) == []


def log_and_hang(file: Path, started: Any) -> None:
    RunLogger("", "run").artifact(file)
    started.set()
    time.sleep(600)


def test_process_killed_next_one_removes_its_copies(hanging: Server, temporary: Path, file: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=log_and_hang, args=(file, started))
    process.start()
    assert started.wait(60)
    assert sweep() == []
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert [path.name for path in copies(temporary)] == ["results.json"]
    assert len(sweep()) == 1
    assert copies(temporary) == []
