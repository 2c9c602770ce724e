"""Temporary folders are removed after their process ended, also if it was killed, and nothing else is removed."""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StorageError
from pipeline.files import scratch as module
from pipeline.files.scratch import Scratch, scratch_folder, sweep


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def hold(started: Any) -> None:
    scratch = Scratch("upload")
    (scratch.folder / "half").write_bytes(b"half")
    started.set()
    time.sleep(600)


def test_scratch_end_of_context_removes_folder(temporary: Path) -> None:
    with scratch_folder("fetched") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(KeyError), scratch_folder("fetched"):
        raise KeyError
    scratch = Scratch("fetched")
    scratch.close()
    scratch.close()
    assert list(temporary.iterdir()) == []


def test_sweep_removes_folder_of_killed_process_only(temporary: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    owner = context.Process(target=hold, args=(started,))
    owner.start()
    assert started.wait(60)
    (left,) = temporary.iterdir()
    with scratch_folder("other"):
        assert (left / "half").read_bytes() == b"half"
    os.kill(owner.pid or 0, signal.SIGKILL)
    owner.join()
    assert left.exists()
    with scratch_folder("other") as folder:
        assert list(temporary.iterdir()) == [folder]


def test_sweep_leaves_foreign_names_links_and_other_hosts(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = module._host()
    kept = [
        f"deformable-detr-fetched-{'0' * 8}-abcdefgh",  # of another host
        f"deformable-detr-fetched-{host}-abcdefghi",
        f"deformable-detr-Backup-{host}-abcdefgh",
        f"my-deformable-detr-fetched-{host}-abcdefgh",
        f"deformable-detr-shards-{os.getuid()}",  # the default `data.cache_dir`
        "fetched_abcdefgh",
    ]
    for name in kept:
        (temporary / name).mkdir()
        (temporary / name / "file").write_text("mine")
    elsewhere = temporary.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    (temporary / f"deformable-detr-link-{host}-abcdefgh").symlink_to(elsewhere)
    (temporary / f"deformable-detr-file-{host}-abcdefgh").write_text("a file")
    (temporary / f"deformable-detr-left-{host}-abcdefgh").mkdir()
    before = {path for path in temporary.iterdir() if "-left-" not in path.name}
    assert sweep() == [temporary / f"deformable-detr-left-{host}-abcdefgh"]
    assert set(temporary.iterdir()) == before
    assert all((temporary / name / "file").read_text() == "mine" for name in kept)
    assert (elsewhere / "file").read_text() == "mine"
    (temporary / f"deformable-detr-left-{host}-abcdefgh").mkdir()
    monkeypatch.setattr(module.os, "getuid", lambda: temporary.stat().st_uid + 1)
    assert sweep() == []


def test_sweep_without_locks_removes_nothing(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")  # NFS locks only what is open for writing

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with scratch_folder("first") as first, scratch_folder("second") as second:
        assert set(temporary.iterdir()) == {first, second}
    assert list(temporary.iterdir()) == []


def test_scratch_many_processes_keep_their_folders(temporary: Path) -> None:
    """A sweep may run between the creation of a folder and its lock."""
    lost: list[Path] = []
    end = time.monotonic() + 2

    def work() -> None:
        while time.monotonic() < end:
            with scratch_folder("busy") as folder:
                sweep()
                if not folder.exists():
                    lost.append(folder)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert list(temporary.iterdir()) == []


def test_scratch_missing_temporary_folder_names_setting(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "none"))
    with pytest.raises(StorageError, match="TMPDIR"):
        Scratch("fetched")


def test_scratch_folder_removed_before_lock_is_made_again(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = tempfile.mkdtemp, []

    def taken(prefix: str) -> str:
        made.append(make(prefix=prefix))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(module.tempfile, "mkdtemp", taken)
    with scratch_folder("new") as folder:
        assert [str(folder)] == made[1:]
