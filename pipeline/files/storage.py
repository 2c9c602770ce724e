"""Files and folders at a local path or an fsspec URL: join, list, read, write, rename, copy, remove, fetch.

Everything that may lie in a bucket uses these functions: runs, checkpoints, shards, weights. Ray Train writes
checkpoints through the same fsspec file system (`ray_storage`), so one set of credentials and one address serve both.
Every call to a remote store is retried (`retry`). Other processes write to the stores too, so fsspec's cache of
listings is never used. Every error of a store is raised as an OSError.
"""

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import PipelineError, RunError, is_disk_full
from pipeline.files.atomic import UNFINISHED, temporary_name, write_file
from pipeline.files.credentials import refuse_login
from pipeline.files.retry import call_with_retries, is_permanent
from pipeline.files.scratch import scratch_folder

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://")  # also fsspec's chains: zip::s3://bucket/a
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "r2"})  # they have no folders
CONNECT_SECONDS, SILENCE_SECONDS = 10.0, 30.0  # longest waits for an HTTP server, per attempt

T = TypeVar("T")


class UnknownStoreError(OSError):
    """No installed package reads or writes URLs of this scheme."""


def is_url(path: str) -> bool:
    """True for `s3://...`, `gs://...`, `file://...`; False for a plain path."""
    return URL.match(path) is not None


def join(folder: str, name: str) -> str:
    """`folder/name`, for paths and URLs."""
    return f"{folder.rstrip('/')}/{name}"


def make_absolute(path: str) -> str:
    """Make a plain path absolute against the current folder; URLs and the empty string are returned as they are."""
    return path if not path or is_url(path) else os.path.abspath(path)


def open_store(path: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
        ConfigError: the URL holds a login.
        UnknownStoreError: nothing reads URLs of this scheme.
    """
    refuse_login(path, "the address")
    if not is_url(path):
        return LocalFileSystem(), str(LocalFileSystem._strip_protocol(path))
    try:
        filesystem, inner = fsspec.core.url_to_fs(path, **_options(path))  # one instance per process and store
    except (ValueError, ImportError) as error:
        raise UnknownStoreError(str(error)) from error
    return filesystem, str(inner)


def _options(path: str) -> dict[str, Any]:
    """What the store of a URL is opened with.

    aiohttp alone gives a transfer five minutes, however large it is, and waits as long for a server that is silent.
    """
    if not path.startswith(("http://", "https://")):
        return {}
    from aiohttp import ClientTimeout  # only such a URL needs it

    timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}


def call_store(path: str, action: Callable[[Any, str], T]) -> T:
    """Return `action(file system, path in it)`; calls to a remote store are retried, so `action` must allow that.

    Raises:
        ConfigError: the URL holds a login.
        OSError: the path cannot be opened, or the last attempt failed. An error of the store's own class is the cause.
    """

    def attempt() -> T:
        filesystem.invalidate_cache()
        try:
            return action(filesystem, inner)
        except FileNotFoundError as error:
            _raise_failure(error)
            raise

    try:
        filesystem, inner = open_store(path)
        return call_with_retries(attempt) if is_url(path) else attempt()
    except PipelineError:
        raise
    except Exception as error:  # credentials, the network: every store has its own family of errors
        if isinstance(error, OSError) and (str(error) or is_permanent(error)):
            raise
        kind = TimeoutError if isinstance(error, TimeoutError) else OSError
        raise kind(str(error) or type(error).__name__) from error


def _raise_failure(error: OSError) -> None:
    """Raise what is behind an error of fsspec's HTTP store, which says "not found" also of a server that fails."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    silent = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    if (silent and status is None) or status in (408, 429) or (isinstance(status, int) and status >= 500):
        raise OSError(str(cause) or type(cause).__name__) from cause


def error_reason(error: BaseException) -> str:
    """The reason that a store or a file system gave, for a message."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def exists(path: str) -> bool:
    """Whether there is a file or folder at a path or URL. Raises OSError if the store does not say."""
    return call_store(path, lambda filesystem, inner: _kind(filesystem, inner) is not None)


def _kind(filesystem: Any, inner: str) -> str | None:
    """`file`, `directory`, or None if there is neither.

    fsspec's `exists` and `isdir` answer False as well where a store refused or did not answer.
    """
    try:
        if isinstance(filesystem, LocalFileSystem):  # its `info` describes links, not what they lead to
            return "directory" if stat.S_ISDIR(os.stat(inner).st_mode) else "file"
        return str(filesystem.info(inner)["type"])
    except (FileNotFoundError, NotADirectoryError) as error:
        _raise_failure(error)
        return None


def subfolders(folder: str) -> list[str]:
    """Names of the folders in `folder`, sorted; empty if there is no such folder."""
    return sorted(_name_of(entry) for entry in _list(folder) if entry["type"] == "directory")


def file_sizes(folder: str) -> dict[str, int]:
    """Bytes of every file in `folder`, by name; empty if there is no such folder."""
    return {_name_of(entry): int(entry["size"]) for entry in _list(folder) if entry["type"] == "file"}


def _list(folder: str) -> list[dict[str, Any]]:
    def action(filesystem: Any, inner: str) -> list[dict[str, Any]]:
        try:  # without `isdir`, which answers False where the store did not answer
            entries = filesystem.ls(inner, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            _raise_failure(error)
            return []
        return [
            entry for entry in entries if str(entry["name"]).rstrip("/") != inner.rstrip("/")
        ]  # a file lists itself

    return call_store(folder, action)


def _name_of(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def file_size(path: str) -> int:
    """Bytes of a file. Raises FileNotFoundError, or another OSError."""
    return call_store(path, lambda filesystem, inner: int(filesystem.size(inner)))


def read_bytes(path: str) -> bytes:
    """The whole file. Raises FileNotFoundError, or another OSError."""
    return call_store(path, lambda filesystem, inner: bytes(filesystem.cat_file(inner)))


def read_range(path: str, offset: int, length: int) -> bytes:
    """Up to `length` bytes from `offset`; fewer where the file ends. Raises as `read_bytes`."""
    if is_url(path):
        end = offset + length
        return call_store(path, lambda filesystem, inner: bytes(filesystem.cat_file(inner, start=offset, end=end)))
    descriptor = os.open(path, os.O_RDONLY)  # without fsspec: loaders do this for every sample
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def download(path: str, target: Path, check: Callable[[], None] = lambda: None) -> None:
    """Copy a file to the local `target`; `check` raises an error if the copy is damaged, and the copy is retried."""

    def action(filesystem: Any, inner: str) -> None:
        filesystem.get_file(inner, str(target))
        check()

    call_store(path, action)


def write_bytes(path: str, content: bytes) -> None:
    """Write a file so that a reader never sees half of it. Its folder is created, a bucket is not."""

    def action(filesystem: Any, inner: str) -> None:
        if isinstance(filesystem, LocalFileSystem):
            write_file(Path(inner), content)
        elif _is_object_store(filesystem):  # objects appear whole, and `makedirs` would create a mistyped bucket
            filesystem.pipe_file(inner, content)
        else:
            _write_and_rename(filesystem, inner, content)

    call_store(path, action)


def _is_object_store(filesystem: Any) -> bool:
    protocols = filesystem.protocol
    return not OBJECT_STORES.isdisjoint((protocols,) if isinstance(protocols, str) else protocols)


def _write_and_rename(filesystem: Any, inner: str, content: bytes) -> None:
    folder, _, name = inner.rpartition("/")
    filesystem.makedirs(folder, exist_ok=True)
    temporary = join(folder, temporary_name(name))
    try:
        filesystem.pipe_file(temporary, content)
        filesystem.mv(temporary, inner)
    except Exception:
        with contextlib.suppress(Exception):
            filesystem.rm(temporary)
        raise


def move(source: str, target: str) -> None:
    """Rename a file within one store."""

    def action(filesystem: Any, inner: str) -> None:
        inner_target = open_store(target)[1]
        try:
            filesystem.mv(inner, inner_target)
        except FileNotFoundError:
            if _kind(filesystem, inner_target) is None:  # else an earlier attempt renamed it and its answer was lost
                raise

    call_store(source, action)


def copy_folder(source: str, target: str) -> None:
    """Copy a folder and everything in it within one store; files of the same names are replaced."""

    def action(filesystem: Any, inner: str) -> None:
        inner_target = open_store(target)[1].rstrip("/")
        filesystem.copy(f"{inner.rstrip('/')}/", f"{inner_target}/", recursive=True)  # with / also into an existing one

    call_store(source, action)


def remove(path: str) -> None:
    """Delete a file, or a folder and everything in it; does nothing if there is none."""

    def action(filesystem: Any, inner: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm(inner, recursive=True)

    call_store(path, action)


def remove_unfinished_files(folder: str) -> None:
    """Remove temporary files that killed processes left in `folder`; nobody may be writing there."""
    for name in file_sizes(folder):
        if UNFINISHED.match(name):
            remove(join(folder, name))


def ray_storage(folder: str) -> tuple[str, Any]:
    """`storage_path` and `storage_filesystem` of Ray's RunConfig: a plain path and None, or an fsspec file system."""
    if not is_url(folder):
        return folder, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem  # only a URL needs it

    filesystem, inner = fsspec.core.url_to_fs(folder, use_listings_cache=False)
    return inner, PyFileSystem(FSSpecHandler(filesystem))


@contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """Yield a local file or folder itself; for a URL, a temporary copy that is removed at the end of the context.

    Raises:
        RunError: the URL cannot be fetched.
    """
    if not is_url(path):
        yield Path(path)
        return
    with scratch_folder("fetched") as scratch:
        target = scratch / (path.rstrip("/").rpartition("/")[2] or "file")
        try:
            call_store(path, lambda filesystem, inner: _fetch(filesystem, inner, target))
        except OSError as error:
            advice = (
                "set TMPDIR to a disk with space" if is_disk_full(error) else "check the address and the credentials"
            )
            raise RunError(f"cannot fetch {path}: {error}; {advice}") from error
        yield target


def _fetch(filesystem: Any, inner: str, target: Path) -> None:
    if _kind(filesystem, inner) is None:  # asked first, because `isdir` says False also of a store that does not answer
        raise FileNotFoundError(inner)
    if filesystem.isdir(inner):
        # The / at the end makes fsspec copy into `target` also where an earlier attempt has created it.
        filesystem.get(inner.rstrip("/") + "/", str(target), recursive=True)
    else:
        filesystem.get_file(inner, str(target))
