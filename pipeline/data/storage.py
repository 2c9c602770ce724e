"""Reading files of a shard folder, wherever it is: a local folder, or a URL that fsspec knows (`s3://`, `memory://`).

Used by `index.load_index` and `dataset.DetectionDataset`. Local shards are read with `pread` on a bounded number of
open files, so that one object serves all samples without seeking; remote ones by byte ranges. Every fault is a
`ShardError` that names the file. File names come from a checked index, never from inside a tar.
"""

import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

from pipeline.errors import ShardError

OPEN_FILES = 64  # per process; far below the usual limit of 1,024 whatever else is open


def is_url(folder: str) -> bool:
    """True for `scheme://...`. Raises ShardError for `pipe:` and other forms that are neither URL nor folder."""
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]*://", folder):
        return True
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]+:", folder) or folder.strip() in {"", "-"}:
        raise ShardError(f"'{folder}' is neither a folder nor a URL like s3://bucket/folder; commands are never run")
    return False


class Store:
    """Read-only access to the files of one shard folder; cheap to pickle, each process opens its own files."""

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/") if len(folder) > 1 else folder
        self._remote = is_url(folder)
        self._files: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def path(self, name: str) -> str:
        """Where file `name` is, for messages and for tools that open it themselves."""
        return f"{self.folder}/{name}"

    def exists(self, name: str) -> bool:
        """True if file `name` is in the folder."""
        return self._exists(self.path(name))

    def folder_exists(self) -> bool:
        """True if there is such a folder."""
        return self._exists(self.folder)

    def read(self, name: str) -> bytes:
        """The whole file. Raises ShardError if it cannot be read."""
        try:
            if self._remote:
                return bytes(self._filesystem().cat_file(self.path(name)))
            return Path(self.path(name)).read_bytes()
        except OSError as error:
            raise self._fault(name, error) from None

    def size(self, name: str) -> int:
        """Bytes of the file. Raises ShardError if it is not there."""
        try:
            if self._remote:
                return int(self._filesystem().size(self.path(name)))
            return os.fstat(self._open(name)).st_size
        except OSError as error:
            raise self._fault(name, error) from None

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises ShardError if the file cannot be read or ends before."""
        try:
            if self._remote:
                data = bytes(self._filesystem().cat_file(self.path(name), start=offset, end=offset + length))
            else:
                data = os.pread(self._open(name), length, offset)
        except OSError as error:
            raise self._fault(name, error) from None
        if len(data) != length:
            raise ShardError(f"{self.path(name)} ends within a sample; run `python -m jobs.shard verify {self.folder}`")
        return data

    def _open(self, name: str) -> int:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        while len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[name] = os.open(self.path(name), os.O_RDONLY)
        return self._files[name]

    def _exists(self, path: str) -> bool:
        return bool(self._filesystem().exists(path)) if self._remote else os.path.exists(path)

    def _filesystem(self) -> Any:
        import fsspec  # a local folder does not need it

        try:
            return fsspec.core.url_to_fs(self.folder)[0]  # fsspec keeps one instance per process and URL
        except (ValueError, ImportError) as error:
            raise ShardError(f"no reader for '{self.folder}': {error}") from None

    def _fault(self, name: str, error: OSError) -> ShardError:
        reason = error.strerror or str(error) or type(error).__name__
        return ShardError(f"cannot read {self.path(name)}: {reason}")
