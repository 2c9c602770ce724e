"""Local paths and fsspec URLs behind one small face: join, make absolute, fetch a file or folder.

Used wherever a run's storage may be a bucket: `driver.py`, `runs.py`, `locate.py`, `registry.py`, weight files.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from pipeline.errors import RunError


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
    filesystem, inner = fsspec.core.url_to_fs(path)
    return bool(filesystem.exists(inner))


def local_folder(path: str) -> Path:
    """The folder itself if it is local, else a downloaded copy in a new temporary folder. Raises RunError."""
    if not is_url(path):
        return Path(path)
    target = tempfile.mkdtemp(prefix="fetched_")
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        filesystem.get(inner.rstrip("/") + "/", target, recursive=True)
    except (OSError, ImportError, ValueError) as error:
        raise RunError(f"cannot fetch {path}: {error}; check `storage` and the credentials") from error
    return Path(target)


@contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """A local file or folder itself; for a URL, a copy of the file or folder that goes with the context.

    Raises:
        RunError: the URL cannot be fetched.
    """
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="fetched_") as scratch:
        target = Path(scratch) / (path.rstrip("/").rpartition("/")[2] or "file")
        try:
            filesystem, inner = fsspec.core.url_to_fs(path)
            if filesystem.isdir(inner):
                filesystem.get(inner.rstrip("/") + "/", str(target), recursive=True)
            else:
                filesystem.get_file(inner, str(target))
        except (OSError, ImportError, ValueError) as error:
            raise RunError(f"cannot fetch {path}: {error}; check the address and the credentials") from error
        yield target


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside a local `path`, in a folder that exists then, which takes its place if all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
