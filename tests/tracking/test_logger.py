"""Copies of files for MLflow are always removed: after they were sent, without space, without a server."""

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
