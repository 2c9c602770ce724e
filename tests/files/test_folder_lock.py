"""A folder's lock has one owner, which another process sees, and an owner that was killed blocks nobody."""

import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from support.paths import ROOT
from support.waiting import wait_until

from pipeline.errors import RunError
from pipeline.files import folder_lock
from pipeline.files.folder_lock import FILE, VERSION, FolderLock, Owner, find_owner, read_owner
from pipeline.files.storage import exists, join, write_bytes

HOLD = """
import sys, time
from pipeline.files.folder_lock import FolderLock
with FolderLock(sys.argv[1], print):
    print("held", flush=True)
    time.sleep(600)
"""
WAIT_SECONDS = 30.0


@pytest.fixture(params=["path", "url"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder that does not exist, on disk and in a store."""
    if request.param == "path":
        yield str(tmp_path / "sweep")
        return
    name = f"lock-{uuid.uuid4().hex}"
    yield f"memory://{name}/sweep"
    store = fsspec.filesystem("memory")
    if store.exists(f"/{name}"):
        store.rm(f"/{name}", recursive=True)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"SETTLE": 0.0, "RENEW": 0.05, "POLL": 0.05, "SILENT": 0.5}.items():
        monkeypatch.setattr(folder_lock, f"{name}_SECONDS", seconds)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock on `tmp_path`/sweep."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "sweep")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def no_loss(owner: Owner) -> None:
    raise AssertionError(owner)


def owner_elsewhere() -> Owner:
    return Owner(uuid.uuid4().hex, "other", "other 0 1", 12, "7", "2026-01-01 00:00:00 UTC")


def write_owner(folder: str, owner: Owner) -> None:
    write_bytes(join(folder, FILE), json.dumps({"version": VERSION, **asdict(owner)}).encode())


def test_folder_lock_end_of_context_leaves_nothing(folder: str) -> None:
    with FolderLock(folder, no_loss):
        assert find_owner(folder) == read_owner(folder)
        assert exists(join(folder, FILE))
    assert not exists(join(folder, FILE))
    assert not Path(folder).exists()


def test_folder_lock_end_of_context_leaves_no_folder_that_it_has_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with FolderLock(str(tmp_path / "there" / "runs" / "first"), no_loss):
        pass
    assert list((tmp_path / "there").iterdir()) == []


def test_folder_lock_end_of_context_keeps_an_empty_folder_that_was_there(tmp_path: Path) -> None:
    """Somebody has made it, perhaps with rights of its own."""
    with FolderLock(str(tmp_path / "given"), no_loss):
        pass
    assert not (tmp_path / "given").exists()
    (tmp_path / "given").mkdir()
    with FolderLock(str(tmp_path / "given"), no_loss):
        pass
    assert (tmp_path / "given").exists()


def test_folder_lock_interrupted_while_it_is_taken_leaves_nothing(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        assert exists(join(folder, FILE))
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_lock.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        FolderLock(folder, no_loss).__enter__()
    assert not exists(join(folder, FILE))


def test_folder_lock_end_of_context_keeps_other_files(tmp_path: Path) -> None:
    with FolderLock(str(tmp_path), no_loss):
        (tmp_path / "sweep.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_folder_lock_held_by_another_process_is_refused_and_names_it(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    folder = str(tmp_path / "sweep")
    with pytest.raises(RunError, match=rf"process {holder.pid} on .*kill {holder.pid}.*--resume"):
        FolderLock(folder, no_loss).__enter__()
    owner = read_owner(folder)
    assert owner
    assert owner.pid == holder.pid


@pytest.mark.parametrize("reaped", [True, False])
def test_folder_lock_of_a_killed_process_is_free_at_once(
    tmp_path: Path, holder: subprocess.Popen[str], reaped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while its parent has not asked how it ended."""
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", 3600.0)
    holder.kill()
    if reaped:
        holder.wait()
    folder = str(tmp_path / "sweep")
    wait_until(lambda: not find_owner(folder))
    with FolderLock(folder, no_loss):
        pass


def test_folder_lock_of_a_stopped_process_is_not_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGSTOP)
    assert find_owner(str(tmp_path / "sweep"))


def test_folder_lock_of_an_older_process_with_the_same_id_is_free(folder: str) -> None:
    with FolderLock(folder, no_loss):
        own = read_owner(folder)
    assert own
    write_owner(folder, replace(own, born="1"))
    assert find_owner(folder) is None


def test_folder_lock_of_another_user_whose_processes_are_hidden_is_watched(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    with FolderLock(folder, no_loss), monkeypatch.context() as patch:
        patch.setattr(folder_lock, "_birth", lambda pid: None)
        patch.setattr(folder_lock.os, "kill", refuse)
        owner = read_owner(folder)
        assert owner
        assert owner.is_alive is None


def test_folder_lock_of_a_silent_process_elsewhere_is_taken_over(folder: str) -> None:
    write_owner(folder, owner_elsewhere())
    with FolderLock(folder, no_loss):
        owner = read_owner(folder)
        assert owner
        assert owner.host != "other"


def test_folder_lock_of_a_silent_process_elsewhere_is_waited_for_once(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command looks at the lock in its checks, and again when it takes it."""
    write_owner(folder, owner_elsewhere())
    assert find_owner(folder) is None
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", WAIT_SECONDS)
    start = time.monotonic()
    with FolderLock(folder, no_loss):
        assert time.monotonic() - start < WAIT_SECONDS


def test_folder_lock_of_a_process_elsewhere_that_renews_it_is_refused(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, ended = owner_elsewhere(), threading.Event()
    write_owner(folder, owner)
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", WAIT_SECONDS)

    def renew() -> None:
        renewals = 0
        while not ended.wait(0.2):
            renewals += 1
            write_owner(folder, replace(owner, renewals=renewals))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(RunError, match="process 12 on other"):
            FolderLock(folder, no_loss).__enter__()
    finally:
        ended.set()
        thread.join()


def test_folder_lock_taken_over_by_a_process_that_was_killed_is_free(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FolderLock(folder, no_loss):
        own = read_owner(folder)
    assert own
    write_owner(folder, owner_elsewhere())
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", WAIT_SECONDS)
    later = threading.Timer(0.2, write_owner, [folder, replace(own, born="1")])
    later.start()
    assert find_owner(folder) is None
    later.join()


@pytest.mark.parametrize(("count", "said"), [(1, 0), (3, 1)])
def test_folder_lock_is_renewed_also_after_faults_of_the_store(
    folder: str, count: int, said: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One alone is not said: it changes nothing."""
    write, faults = folder_lock.write_bytes, [OSError("no answer")] * count

    def failing(path: str, content: bytes) -> None:
        if renewing.is_set() and faults:
            raise faults.pop()
        write(path, content)

    renewing = threading.Event()
    monkeypatch.setattr(folder_lock, "write_bytes", failing)
    with FolderLock(folder, no_loss):
        renewing.set()
        wait_until(lambda: not faults and renewals(folder) >= 2)
    assert caplog.text.count("no answer") == said


def renewals(folder: str) -> int:
    owner = read_owner(folder)
    assert owner
    return owner.renewals


def test_folder_lock_that_another_process_took_over_is_lost_and_stays_its_own(folder: str) -> None:
    lost: list[Owner] = []
    with FolderLock(folder, lost.append):
        taker = owner_elsewhere()
        wait_until(lambda: lost, lambda: write_owner(folder, taker))  # again: a renewal that has begun replaces it
    assert lost == [taker]
    assert read_owner(folder) == taker


def test_folder_lock_of_processes_that_start_at_once_has_one_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them find it free, and each has written before the first one reads who it is."""
    monkeypatch.setattr(folder_lock, "RENEW_SECONDS", 3600.0)
    found, settled, results = threading.Barrier(4), threading.Barrier(4), []

    def find(folder: str) -> Owner | None:
        owner = find_owner(folder)
        found.wait(WAIT_SECONDS)
        return owner

    monkeypatch.setattr(folder_lock, "find_owner", find)
    monkeypatch.setattr(folder_lock, "time", SimpleNamespace(sleep=lambda _: settled.wait(WAIT_SECONDS)))

    def take() -> None:
        lock = FolderLock(str(tmp_path / "sweep"), no_loss)
        try:
            lock.__enter__()
            results.append(lock)
        except RunError as error:
            results.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (owner,) = [result for result in results if isinstance(result, FolderLock)]
    assert len(results) == 4
    owner.__exit__(None, None, None)
    assert not (tmp_path / "sweep").exists()


def test_folder_lock_that_this_process_could_not_remove_does_not_keep_it_out(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook goes on after a second Ctrl-C, or after a fault of the store."""

    def refuse(path: str) -> None:
        raise OSError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(folder_lock, "remove", refuse)
        with FolderLock(folder, no_loss):
            assert find_owner(folder)
    assert exists(join(folder, FILE))
    assert find_owner(folder) is None
    with FolderLock(folder, no_loss):
        assert find_owner(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"version": 2}', b'{"version": 1, "pid": 1}'])
def test_folder_lock_that_cannot_be_read_is_named(folder: str, content: bytes) -> None:
    write_bytes(join(folder, FILE), content)
    with pytest.raises(RunError, match=FILE):
        find_owner(folder)
