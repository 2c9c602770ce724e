"""Paths and URLs behind the same functions; calls to remote stores are retried."""

import errno
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.store import http_store

from pipeline.data.index import load_index
from pipeline.errors import RunError, ShardError
from pipeline.files import retry, storage
from pipeline.files.atomic import temporary_name
from pipeline.files.storage import (
    copy_folder,
    download,
    exists,
    file_size,
    file_sizes,
    is_url,
    join,
    local_copy,
    make_absolute,
    move,
    read_bytes,
    read_range,
    remove,
    remove_unfinished_files,
    subfolders,
    write_bytes,
)


def test_make_absolute_path_or_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_absolute("runs") == str(tmp_path / "runs")
    assert make_absolute("s3://bucket/runs") == "s3://bucket/runs"
    assert make_absolute("") == ""
    assert is_url("s3://b")
    assert is_url("zip::s3://b/a.zip")
    assert not is_url("/b")
    assert not is_url("a folder/s3://b")
    assert join("s3://b/", "x") == "s3://b/x"


def test_local_copy_unknown_scheme_raises_run_error() -> None:
    with pytest.raises(RunError, match="nowhere://x"), local_copy("nowhere://x"):
        raise AssertionError("there is no such store")


def test_local_copy_file_or_folder_is_removed_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(RunError, match="memory://copies/none"), local_copy("memory://copies/none"):
        raise AssertionError("there is no such file")
    with pytest.raises(KeyError), local_copy("memory://copies/folder"):
        raise KeyError
    assert list((tmp_path / "temporary").iterdir()) == []


def test_local_copy_full_disk_names_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fsspec.filesystem("memory").pipe("/full/file", b"x")
    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(RunError, match="TMPDIR"), local_copy("memory://full/file"):
        raise AssertionError("there is no room for it")


@pytest.mark.parametrize("prefix", ["", "file://", "local://"])
def test_write_bytes_local_syncs_before_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
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


def test_write_bytes_folder_without_sync_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(f"{tmp_path}/run.json", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("step", ["write", "sync"])  # network drives report a full disk at the sync
def test_write_bytes_local_failure_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
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


def test_write_bytes_remote_failure_keeps_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_remove_unfinished_files_keeps_other_names(tmp_path: Path) -> None:
    kept = ["run.json", ".run.json", f".{'a' * 31}.run.json", f".{'A' * 32}.run.json", f"{'a' * 32}.run.json"]
    for name in [*kept, temporary_name("run.json"), temporary_name("epoch_002.jsonl")]:
        (tmp_path / name).touch()
    (tmp_path / temporary_name("a folder")).mkdir()
    remove_unfinished_files(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(kept)
    remove_unfinished_files(str(tmp_path / "absent"))


class UnreliableStore(MemoryFileSystem):
    """`unreliable://`: every first call of a method fails, as after a lost connection."""

    protocol = "unreliable"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    called: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("unreliable://", "memory://"))

    def _fail_once(self, method: str) -> None:
        self.called.append(method)
        if self.called.count(method) % 2:
            raise RuntimeError(f"{method}: connection lost")

    def info(self, path: str, **options: Any) -> Any:
        if "info" not in self.called:  # other methods of the base class use it as well
            self._fail_once("info")
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._fail_once("ls")
        return super().ls(path, detail, **options)

    def size(self, path: str) -> Any:
        self._fail_once("size")
        return super().size(path)

    def cat_file(self, path: str, **options: Any) -> Any:
        self._fail_once("cat_file")
        return super().cat_file(path, **options)

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        self._fail_once("get_file")
        super().get_file(rpath, lpath, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> Any:
        self._fail_once("pipe_file")
        return super().pipe_file(path, value, **options)

    def mv(self, path1: str, path2: str, **options: Any) -> Any:
        """The store renames, but the answer is lost."""
        if "mv" not in self.called:
            self._rename(path1, path2)
        self._fail_once("mv")
        self._rename(path1, path2)

    def _rename(self, source: str, target: str) -> None:
        if source not in self.store:
            raise FileNotFoundError(source)
        self.store[target] = self.store.pop(source)

    def rm(self, path: str, **options: Any) -> Any:
        """The store removes, but the answer is lost."""
        if "rm" not in self.called:
            super().rm(path, **options)
        self._fail_once("rm")
        return super().rm(path, **options)


@pytest.fixture
def unreliable(monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with the file `a` in the store."""
    fsspec.register_implementation("unreliable", UnreliableStore, clobber=True)
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    for name, empty in {"store": {}, "pseudo_dirs": [""], "called": []}.items():
        monkeypatch.setattr(UnreliableStore, name, empty)
    MemoryFileSystem.pipe_file(UnreliableStore(), "/folder/a", b"content")
    return "unreliable://folder"


def test_every_function_lost_connection_is_retried(unreliable: str, tmp_path: Path) -> None:
    assert exists(f"{unreliable}/a")
    assert file_sizes(unreliable) == {"a": 7}
    assert subfolders(unreliable) == []
    assert file_size(f"{unreliable}/a") == 7
    assert read_bytes(f"{unreliable}/a") == b"content"
    assert read_range(f"{unreliable}/a", 3, 99) == b"tent"
    download(f"{unreliable}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content"
    with local_copy(f"{unreliable}/a") as path:
        assert path.read_bytes() == b"content"
    assert set(UnreliableStore.called) == {"info", "ls", "size", "cat_file", "get_file"}


def test_exists_of_a_store_that_refuses_or_is_down_raises(unreliable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fsspec says False, so that a run's name would seem to be free."""
    for error in (PermissionError("no access"), RuntimeError("connection lost"), TimeoutError("no answer")):

        def fail(*_: object, raised: Exception = error, **__: object) -> None:
            raise raised

        monkeypatch.setattr(UnreliableStore, "info", fail)
        with pytest.raises(OSError, match=str(error)):
            exists(f"{unreliable}/a")
        with pytest.raises(RunError, match=unreliable), local_copy(f"{unreliable}/a"):
            pass


def test_exists_over_http_tells_a_missing_file_from_a_server_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    (tmp_path / "a").write_bytes(b"content")
    with http_store(str(tmp_path)) as server:
        assert exists(f"{server.url}/a")
        assert not exists(f"{server.url}/b")
    with http_store(str(tmp_path), fail_every=1) as server, pytest.raises(OSError, match="503"):
        exists(f"{server.url}/a")
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        exists(f"{server.url}/a")  # it is closed


def test_local_copy_over_http_fetches_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_bytes(b"content")
    with http_store(str(tmp_path)) as server:
        with local_copy(f"{server.url}/run/a") as path:
            assert path.read_bytes() == b"content"
        with pytest.raises(RunError, match="absent"), local_copy(f"{server.url}/absent"):
            pass


def test_exists_of_an_absent_file_without_a_message_is_false(unreliable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError

    for method in ("info", "cat_file"):
        monkeypatch.setattr(UnreliableStore, method, fail)
    assert not exists(f"{unreliable}/a")
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{unreliable}/a")


def test_silent_http_server_is_an_error_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/shards"
        began = time.monotonic()
        for call in (exists, read_bytes, file_size):
            with pytest.raises(OSError, match=r"(?i)timeout"):
                call(f"{url}/index.json")
        with pytest.raises(ShardError, match=url):
            load_index(url)
        assert time.monotonic() - began < 30


def test_write_bytes_lost_connection_leaves_one_file(unreliable: str) -> None:
    write_bytes(f"{unreliable}/b", b"new")
    assert file_sizes(unreliable) == {"a": 7, "b": 3}


def test_move_and_remove_lost_answer_is_success(unreliable: str) -> None:
    move(f"{unreliable}/a", f"{unreliable}/b")
    assert file_sizes(unreliable) == {"b": 7}
    remove(f"{unreliable}/b")
    remove(f"{unreliable}/b")
    assert file_sizes(unreliable) == {}
    with pytest.raises(FileNotFoundError):
        move(f"{unreliable}/b", f"{unreliable}/c")


def test_download_damaged_copy_is_retried(unreliable: str, tmp_path: Path) -> None:
    assert exists(f"{unreliable}/a")  # after its one fault `info` answers
    attempts = []

    def check() -> None:
        attempts.append((tmp_path / "a").read_bytes())
        if len(attempts) < 3:
            raise ValueError("damaged")

    download(f"{unreliable}/a", tmp_path / "a", check)
    assert attempts == [b"content"] * 3


@pytest.mark.parametrize("there", [False, True])
def test_copy_folder_local_or_remote_has_the_same_files(unreliable: str, tmp_path: Path, there: bool) -> None:
    (tmp_path / "a/inner").mkdir(parents=True)
    (tmp_path / "a/inner/file").write_bytes(b"content")
    if there:
        (tmp_path / "b").mkdir()
    copy_folder(f"{tmp_path}/a", f"{tmp_path}/b")
    assert (tmp_path / "b/inner/file").read_bytes() == b"content"
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["inner"]
    copy_folder(unreliable, "unreliable://other/b")
    copy_folder(unreliable, "unreliable://other/b")
    assert file_sizes("unreliable://other/b") == {"a": 7}


def test_list_missing_folder_or_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (f"{tmp_path}/absent", f"{tmp_path}/file", "memory://absent"):
        assert file_sizes(folder) == {}
        assert subfolders(folder) == []
