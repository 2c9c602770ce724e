"""Locks of dead builds are cleared, those of living ones are not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.extension_locks import LONGEST_BUILD, clear_stale_locks, extensions_folder

HOLD = """
import sys
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_only_the_lock_of_a_dead_maker_is_cleared(tmp_path: Path) -> None:
    """As torch makes it, alive at first and then killed."""
    lock = tmp_path / "py311_cpu" / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "held\n"
        assert clear_stale_locks(tmp_path) == []
        maker.kill()
    assert lock.exists()
    assert clear_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


@pytest.mark.parametrize(("kind", "age", "cleared"), [
    ("ext4", 0.0, True), ("nfs4", 0.0, False), ("fuse.glusterfs", 0.0, False), ("nfs4", LONGEST_BUILD + 1, True),
])  # fmt: skip
def test_on_a_shared_folder_another_machine_may_build(tmp_path: Path, kind: str, age: float, cleared: bool) -> None:
    processes, folder = tmp_path / "proc", tmp_path / "extensions"
    (processes / "self").mkdir(parents=True)
    (processes / "self" / "mounts").write_text(f"/dev/sda / ext4 rw 0 0\nhost:/x {folder} {kind} rw 0 0\n")
    lock = folder / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    assert clear_stale_locks(folder, processes) == [lock] * cleared
    assert lock.exists() is not cleared


def test_without_locks_or_proc_nothing_is_done(tmp_path: Path) -> None:
    assert clear_stale_locks(tmp_path / "nowhere") == []
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "lock").touch()
    assert clear_stale_locks(tmp_path, tmp_path / "no_proc") == []


def test_the_folder_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import get_default_build_root  # says on import that it finds no CUDA

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert str(extensions_folder()) == get_default_build_root()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path
