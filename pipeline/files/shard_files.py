"""Read access to the files of a shard folder, local or behind an fsspec URL.

Every fault is a ShardError that names the file and says what to do. File names come from a checked index, never from
inside a tar. Calls to a remote store are retried (`storage.call_store`).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.errors import ShardError, is_disk_full
from pipeline.files import storage
from pipeline.files.credentials import refuse_login
from pipeline.files.retry import ATTEMPTS, is_permanent

T = TypeVar("T")
COMMAND = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # `pipe:`, which webdataset would run; also other forms of URLs


class MissingFileError(ShardError):
    """The requested file does not exist."""


def is_shard_url(folder: str) -> bool:
    """`storage.is_url` for the address of shards. Raises ShardError for `pipe:` and what is neither URL nor folder."""
    if storage.is_url(folder):
        return True
    if COMMAND.match(folder) or folder.strip() in {"", "-"}:
        raise ShardError(f"'{folder}' is neither a folder nor a URL like s3://bucket/folder; commands are never run")
    return False


class Store:
    """The files of one shard folder; keeps nothing open."""

    def __init__(self, folder: str) -> None:
        folder = folder.removeprefix("file://")
        self.folder = folder.rstrip("/") if len(folder) > 1 else folder
        self.remote = is_shard_url(folder)
        refuse_login(folder, "the address of the shards")

    def path(self, name: str) -> str:
        """Path or URL of file `name`."""
        return f"{self.folder}/{name}"

    def exists(self, name: str) -> bool:
        """True if file `name` is in the folder."""
        return self._call(self.path(name), storage.exists)

    def folder_exists(self) -> bool:
        """True if there is such a folder."""
        return self._call(self.folder, storage.exists)

    def read(self, name: str) -> bytes:
        """The whole file. Raises ShardError if it cannot be read, MissingFileError if it does not exist."""
        return self._call(self.path(name), storage.read_bytes)

    def size(self, name: str) -> int:
        """Bytes of the file. Raises as `read`."""
        return self._call(self.path(name), storage.file_size)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises as `read`, also ShardError if the file ends before."""
        data = self._call(self.path(name), lambda path: storage.read_range(path, offset, length))
        if len(data) != length:
            raise self.cut_short(name)
        return data

    def download(self, name: str, target: Path, check: Callable[[], None]) -> None:
        """Copy a remote file to `target`; `check` raises ValueError if the copy is damaged.

        Raises:
            MissingFileError: the file does not exist.
            ShardError: it cannot be read, the local disk is full, or every attempt's copy was damaged.
        """

        def copy(path: str) -> None:
            try:
                storage.download(path, target, check)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                raise ShardError(
                    f"no space for {name} in {target.parent}; lower data.cache_gib, or set data.cache_dir to a folder "
                    "with space on this node's disk"
                ) from None

        self._call(self.path(name), copy)

    def cut_short(self, name: str) -> ShardError:
        """The error for a file that ends within one of its samples."""
        return ShardError(f"{self.path(name)} ends within a sample; run `python -m jobs.shard verify {self.folder}`")

    def _call(self, path: str, action: Callable[[str], T]) -> T:
        try:
            return action(path)
        except OSError as error:
            reason = storage.error_reason(error)
            if isinstance(error, storage.UnknownStoreError):
                raise ShardError(f"no reader for '{self.folder}': {reason}") from None
            if not self.remote:
                kind = MissingFileError if isinstance(error, FileNotFoundError) else ShardError
                raise kind(f"cannot read {path}: {reason}") from None
            if isinstance(error, FileNotFoundError):
                raise MissingFileError(
                    f"cannot read {path}: it does not exist; upload it again, or build the shards again"
                ) from None
            if is_permanent(error) or is_permanent(error.__cause__ or error):
                raise ShardError(f"cannot read {path}: {reason}") from None
            raise ShardError(
                f"cannot read {path}, tried {ATTEMPTS} times: {reason}; run the same command again to continue"
            ) from None
