"""Whole files of a shard folder, wherever it is: a local folder, or a URL that fsspec knows (`s3://`, `memory://`).

Used by `index.load_index`, `verify` and, for the bytes of samples, `reader`. Remote calls are tried again while a store
fails (`retry`). Every fault is a `ShardError` that names the file. File names come from a checked index, never from
inside a tar.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ShardError, is_disk_full
from pipeline.files.credentials import refuse_login
from pipeline.files.retry import ATTEMPTS, FOREVER, retrying

T = TypeVar("T")


class MissingFileError(ShardError):
    """The file that was asked for does not exist."""


def is_url(folder: str) -> bool:
    """True for `scheme://...`. Raises ShardError for `pipe:` and other forms that are neither URL nor folder."""
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]*://", folder):
        return True
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]+:", folder) or folder.strip() in {"", "-"}:
        raise ShardError(f"'{folder}' is neither a folder nor a URL like s3://bucket/folder; commands are never run")
    return False


class Store:
    """Read-only access to the files of one shard folder; holds nothing open."""

    def __init__(self, folder: str) -> None:
        folder = folder.removeprefix("file://")
        self.folder = folder.rstrip("/") if len(folder) > 1 else folder
        self.remote = is_url(folder)
        refuse_login(folder, "the address of the shards")

    def path(self, name: str) -> str:
        """Where file `name` is, for messages and for tools that open it themselves."""
        return f"{self.folder}/{name}"

    def exists(self, name: str) -> bool:
        """True if file `name` is in the folder."""
        return self._exists(name)

    def folder_exists(self) -> bool:
        """True if there is such a folder."""
        return self._exists("")

    def read(self, name: str) -> bytes:
        """The whole file. Raises ShardError if it cannot be read, MissingFileError if it is not there."""
        if self.remote:
            return self._ask(name, lambda files, path: bytes(files.cat_file(path)))
        return self._here(name, lambda path: Path(path).read_bytes())

    def size(self, name: str) -> int:
        """Bytes of the file. Raises as `read`."""
        if self.remote:
            return self._ask(name, lambda files, path: int(files.size(path)))
        return self._here(name, lambda path: os.stat(path).st_size)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises as `read`, also ShardError if the file ends before."""
        if self.remote:
            end = offset + length
            data = self._ask(name, lambda files, path: bytes(files.cat_file(path, start=offset, end=end)))
        else:
            data = self._here(name, lambda path: _read_range(path, offset, length))
        if len(data) != length:
            raise self.cut_short(name)
        return data

    def download(self, name: str, target: Path, check: Callable[[], None]) -> None:
        """Copy a remote file to `target`; `check` raises ValueError if the copy is not what it should be.

        Raises:
            MissingFileError: there is no such file.
            ShardError: it cannot be read, the disk is full, or not one of the copies is right.
        """

        def fetch(files: Any, path: str) -> None:
            try:
                files.get_file(path, str(target))
            except OSError as error:
                if not is_disk_full(error):
                    raise
                raise ShardError(
                    f"no space for {name} in {target.parent}; lower data.cache_gib, or set data.cache_dir to a folder "
                    "with space on this node's disk"
                ) from None
            check()

        self._ask(name, fetch)

    def cut_short(self, name: str) -> ShardError:
        """The error of a file that ends before one of its samples does."""
        return ShardError(f"{self.path(name)} ends within a sample; run `python -m jobs.shard verify {self.folder}`")

    def _exists(self, name: str) -> bool:
        if not self.remote:
            return os.path.exists(self.path(name) if name else self.folder)
        return self._ask(name, lambda files, path: bool(files.exists(path)))

    def _here(self, name: str, action: Callable[[str], T]) -> T:
        try:
            return action(self.path(name))
        except OSError as error:
            kind = MissingFileError if isinstance(error, FileNotFoundError) else ShardError
            raise kind(f"cannot read {self.path(name)}: {_reason(error)}") from None

    def _ask(self, name: str, action: Callable[[Any, str], T]) -> T:
        """`action` on the URL's file system and the file's path there, tried again while it fails."""
        files, folder = self._filesystem()
        path = f"{folder.rstrip('/')}/{name}" if name else folder
        try:
            return retrying(lambda: action(files, path))
        except ShardError:
            raise
        except FileNotFoundError:
            raise MissingFileError(
                f"cannot read {self.path(name)}: it is not there; upload it again, or build the shards again"
            ) from None
        except FOREVER as error:
            raise ShardError(f"cannot read {self.path(name)}: {_reason(error)}") from None
        except Exception as error:  # the families of errors of all stores; the reason says which
            raise ShardError(
                f"cannot read {self.path(name)}, tried {ATTEMPTS} times: {_reason(error)}; the same command goes on "
                "where this one stopped"
            ) from None

    def _filesystem(self) -> tuple[Any, str]:
        import fsspec  # a local folder does not need it

        try:
            files, folder = fsspec.core.url_to_fs(self.folder)  # fsspec keeps one instance per process and URL
        except (ValueError, ImportError) as error:
            raise ShardError(f"no reader for '{self.folder}': {error}") from None
        return files, str(folder)


def _read_range(path: str, offset: int, length: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
