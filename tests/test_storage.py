"""Paths and URLs through one face."""

import errno
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import RunError
from pipeline.storage import absolute, is_url, join, local_copy, local_folder, replacing, write_bytes


def test_urls_stay_and_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("runs") == str(tmp_path / "runs")
    assert absolute("s3://bucket/runs") == "s3://bucket/runs"
    assert absolute("") == ""
    assert is_url("s3://b")
    assert not is_url("/b")
    assert join("s3://b/", "x") == "s3://b/x"


def test_remote_folder_is_fetched(tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/run/checkpoint/state.json", "wt") as file:
        file.write("{}")
    fetched = local_folder("memory://bucket/run/checkpoint")
    assert (fetched / "state.json").read_text() == "{}"
    assert local_folder(str(tmp_path)) == tmp_path


def test_unknown_store_is_named() -> None:
    with pytest.raises(RunError, match="nowhere://x"):
        local_folder("nowhere://x")


def test_local_copy_of_files_and_folders(tmp_path: Path) -> None:
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


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(filesystem: LocalFileSystem, path: str, content: bytes) -> None:
        Path(path).write_bytes(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    write_bytes(f"{tmp_path}/run.json", b"before")
    monkeypatch.setattr(LocalFileSystem, "pipe_file", half)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(f"{tmp_path}/run.json", b"after")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("run.json", b"before")]
