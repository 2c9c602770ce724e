"""Paths and URLs through one face."""

import errno
import os
import tempfile
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import RunError
from pipeline.files.storage import (
    absolute,
    is_url,
    join,
    local_copy,
    remove_unfinished,
    replacing,
    temporary_name,
    write_bytes,
)


def test_urls_stay_and_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("runs") == str(tmp_path / "runs")
    assert absolute("s3://bucket/runs") == "s3://bucket/runs"
    assert absolute("") == ""
    assert is_url("s3://b")
    assert not is_url("/b")
    assert join("s3://b/", "x") == "s3://b/x"


def test_unknown_store_is_named() -> None:
    with pytest.raises(RunError, match="nowhere://x"), local_copy("nowhere://x"):
        raise AssertionError("there is no such store")


def test_local_copy_of_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "file").write_text("here")
    with local_copy(str(tmp_path / "file")) as path:
        assert path == tmp_path / "file"
    assert path.exists()
    memory = fsspec.filesystem("memory")
    memory.pipe({"/copies/folder/a.txt": b"a", "/copies/folder/deep/b.txt": b"b"})
    with local_copy("memory://copies/folder") as path:
        assert (path / "deep" / "b.txt").read_text() == "b"
    assert not path.exists()
    with local_copy("memory://copies/folder/a.txt") as path:
        assert (path.name, path.read_text()) == ("a.txt", "a")
    with pytest.raises(RunError, match="cannot fetch memory://copies/none"), local_copy("memory://copies/none"):
        raise AssertionError("there is no such file")
    with pytest.raises(KeyError), local_copy("memory://copies/folder"):
        raise KeyError
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_temporary_folder_without_space_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fsspec.filesystem("memory").pipe("/full/file", b"x")
    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(RunError, match="TMPDIR"), local_copy("memory://full/file"):
        raise AssertionError("there is no room for it")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    with pytest.raises(FileNotFoundError), replacing(path) as temporary:
        temporary.unlink(missing_ok=True)  # nothing was written, so there is nothing to put in its place
    with pytest.raises(IsADirectoryError), replacing(path) as temporary:
        temporary.write_bytes(tmp_path.read_bytes())
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileExistsError), replacing(path / "below"):
        raise AssertionError("a file has nothing below it")


def test_replacing_twice_at_once_the_temporary_names_differ(tmp_path: Path) -> None:
    """Nodes share a folder and may have equal process ids."""
    path = tmp_path / "archive.pt2"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        assert {first.suffix, second.suffix} == {".pt2"}  # torch.export looks at it
        for temporary in (first, second):
            temporary.write_bytes(b"x")


@pytest.mark.parametrize("prefix", ["", "file://", "local://"])
def test_write_bytes_on_this_machine_reaches_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    write_bytes(f"{prefix}{tmp_path}/new/run.json", b"content")
    assert done == ["file", "rename", "folder"]
    assert (tmp_path / "new" / "run.json").read_bytes() == b"content"


def test_a_folder_that_cannot_be_synced_takes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(f"{tmp_path}/run.json", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("step", ["write", "sync"])  # network drives report a full disk at the latter
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:2])
        full()

    write_bytes(f"{tmp_path}/run.json", b"before")
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_bytes", half) if step == "write" else (os, "fsync", full)))
        with pytest.raises(OSError, match="No space left"):
            write_bytes(f"{tmp_path}/run.json", b"after")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("run.json", b"before")]


def test_another_store_renames_too_and_leaves_nothing_of_a_failed_write(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")

    def half(filesystem: MemoryFileSystem, path: str, content: bytes) -> None:
        with store.open(path, "wb") as file:
            file.write(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    write_bytes("memory://renamed/run.json", b"before")
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", half)
    with pytest.raises(OSError, match="No space left"):
        write_bytes("memory://renamed/run.json", b"after")
    assert store.find("/renamed") == ["/renamed/run.json"]
    assert store.cat("/renamed/run.json") == b"before"


def test_remove_unfinished_takes_only_names_of_its_own_form(tmp_path: Path) -> None:
    kept = ["run.json", ".run.json", f".{'a' * 31}.run.json", f".{'A' * 32}.run.json", f"{'a' * 32}.run.json"]
    for name in [*kept, temporary_name("run.json"), temporary_name("epoch_002.jsonl")]:
        (tmp_path / name).touch()
    (tmp_path / temporary_name("a folder")).mkdir()
    remove_unfinished(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(kept)
    remove_unfinished(str(tmp_path / "absent"))
