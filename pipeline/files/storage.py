"""Local paths and fsspec URLs behind one small face: join, make absolute, list, read and write, fetch a file or folder.

For all that may lie in a bucket: runs, checkpoints, files of weights. Ray Train writes checkpoints through the same
fsspec file system (`ray_storage`), so that one set of credentials and one address serve both. Other processes write
there too, so nothing is answered from fsspec's memory of listings. Whatever a store raises arrives as an OSError.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import RunError, is_disk_full
from pipeline.files.credentials import refuse_login
from pipeline.files.scratch import scratch_folder

UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.")  # how the names of `temporary_name` begin
OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "r2"})  # stores that have no folders


def is_url(path: str) -> bool:
    """True for `s3://...`, `gs://...`, `file://...`; False for a plain path."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """`folder/name` for both kinds."""
    return f"{folder.rstrip('/')}/{name}"


def absolute(path: str) -> str:
    """A plain path made absolute against the current folder; URLs and the empty string stay."""
    return path if not path or is_url(path) else os.path.abspath(path)


def exists(path: str) -> bool:
    """Whether there is a file or folder at a path or URL."""
    with _opened(path) as (filesystem, inner):
        return bool(filesystem.exists(inner))


def subfolders(folder: str) -> list[str]:
    """Names of the folders in `folder`, sorted; empty if there is no such folder."""
    with _opened(folder) as (filesystem, inner):
        if not filesystem.isdir(inner):
            return []
        found = filesystem.ls(inner, detail=True)
    return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory")


def file_sizes(folder: str) -> dict[str, int]:
    """Bytes of every file in `folder`, by name; empty if there is no such folder."""
    with _opened(folder) as (filesystem, inner):
        if not filesystem.isdir(inner):
            return {}
        found = filesystem.ls(inner, detail=True)
    return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in found if entry["type"] == "file"}


def read_bytes(path: str) -> bytes:
    """The whole file. Raises FileNotFoundError, or another OSError."""
    with _opened(path) as (filesystem, inner):
        return bytes(filesystem.cat_file(inner))


def write_bytes(path: str, content: bytes) -> None:
    """Write a file so that a reader never sees half of it; its folder is made, a bucket is not."""
    with _opened(path) as (filesystem, inner):
        if _has_objects(filesystem):  # they appear whole, and "making the folder" would make a mistyped bucket
            filesystem.pipe_file(inner, content)
            return
        if isinstance(filesystem, LocalFileSystem):
            with replacing(Path(inner)) as unfinished:
                unfinished.write_bytes(content)
            return
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
    with _opened(source) as (filesystem, inner):
        filesystem.mv(inner, fsspec.core.url_to_fs(target)[1])


def remove(path: str) -> None:
    """Delete a file, or a folder and what is in it."""
    with _opened(path) as (filesystem, inner):
        filesystem.rm(inner, recursive=True)


def ray_storage(folder: str) -> tuple[str, Any]:
    """`storage_path` and `storage_filesystem` of Ray's RunConfig: a plain path and None, or an fsspec file system."""
    if not is_url(folder):
        return folder, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem  # only a URL needs it

    filesystem, inner = fsspec.core.url_to_fs(folder, use_listings_cache=False)
    return inner, PyFileSystem(FSSpecHandler(filesystem))


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, str]]:
    """The file system of a path or URL, and the path in it. Raises ConfigError for a URL that holds a login."""
    refuse_login(path, "the address")
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        filesystem.invalidate_cache()
        yield filesystem, inner
    except OSError:
        raise
    except Exception as error:  # a missing package, credentials, the network: each store has a family of its own
        raise OSError(f"{error or type(error).__name__}") from error


def _has_objects(filesystem: Any) -> bool:
    protocols = filesystem.protocol
    return not OBJECTS.isdisjoint((protocols,) if isinstance(protocols, str) else protocols)


@contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """A local file or folder itself; for a URL, a copy of the file or folder that goes with the context.

    Raises:
        RunError: the URL cannot be fetched.
    """
    if not is_url(path):
        yield Path(path)
        return
    with scratch_folder("fetched") as scratch:
        target = scratch / (path.rstrip("/").rpartition("/")[2] or "file")
        try:
            with _opened(path) as (filesystem, inner):
                if filesystem.isdir(inner):
                    filesystem.get(inner.rstrip("/") + "/", str(target), recursive=True)
                else:
                    filesystem.get_file(inner, str(target))
        except OSError as error:
            advice = (
                "set TMPDIR to a disk with space" if is_disk_full(error) else "check the address and the credentials"
            )
            raise RunError(f"cannot fetch {path}: {error}; {advice}") from error
        yield target


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside a local `path`, in a folder that exists then, which takes its place if all went well.

    The bytes are on the disk before the name is, so that a machine that loses power keeps the old file or the new one.
    Where `path` is a link, the file that it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
        rename_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rename_durably(source: Path, target: Path) -> None:
    """Rename a local file after its bytes reached the disk, and wait until the disk has the new name too."""
    sync(source)
    source.replace(target)
    with contextlib.suppress(OSError):  # not every file system syncs folders; the file itself is safe
        sync(target.parent)


def sync(path: Path) -> None:
    """Wait until the disk has a local file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: str) -> None:
    """Remove what killed processes left of files that they wrote into `folder`; nobody may be writing there."""
    for name in file_sizes(folder):
        if UNFINISHED.match(name):
            remove(join(folder, name))


def temporary_name(name: str) -> str:
    """A name for the unfinished file `name`: hidden, of the same suffix, and never made twice, on no node."""
    return f".{uuid.uuid4().hex}.{name}"
