"""The folder that a build writes, local or behind an fsspec URL; nothing is written outside of it.

A local file is renamed to its name when it is complete; a remote file appears as its store does it. Either way, a build
trusts a tar only if its receipt and sha256 match, and readers trust a folder only if it has an `index.json`. Every
fault is a ShardError that names the file.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pipeline.errors import ShardError
from pipeline.files.atomic import rename_durably
from pipeline.files.credentials import refuse_login
from pipeline.files.scratch import lock_folder, scratch_folder
from pipeline.files.shard_files import is_shard_url
from pipeline.files.storage import UnknownStoreError, call_store, error_reason, join, open_store, read_bytes, remove

BUILD = ".build"  # in the folder while it is unfinished: receipts and half-written files
HASH_CHUNK_BYTES = 2**22

T = TypeVar("T")


class Output:
    """Write access to one shard folder; each process makes its own."""

    def __init__(self, folder: str) -> None:
        """Raises ShardError for `pipe:` and a URL that no installed package writes, ConfigError for a login in it."""
        self.folder = folder.rstrip("/") if len(folder) > 1 else folder
        self._local = not is_shard_url(folder)
        refuse_login(folder, "the address of the shards")
        try:
            self._root = open_store(self.folder)[1]
        except UnknownStoreError as error:
            raise ShardError(f"no writer for '{folder}': {error}") from None
        self._lock: int | None = None

    def prepare(self) -> bool:
        """Make the folder and its `.build`, and keep other builds out until `release`; True if it was empty or new.

        In a store, and on a network drive without locks, two builds at once are not noticed.

        Raises:
            ShardError: it holds something other than an unfinished build, another process builds it, or it cannot be
                written.
        """
        present = self.names()
        if present and (BUILD not in present or os.path.islink(self._at(BUILD))):
            raise ShardError(f"{self.folder} is not empty and is not an unfinished build; give a new folder")
        # Stores without folders do nothing here.
        self._call(BUILD, lambda files, path: files.makedirs(path, exist_ok=True))
        self.release()
        if self._local:
            with self._naming(BUILD):
                self._lock = lock_folder(Path(self._at(BUILD)))
            if self._lock is None:
                raise ShardError(f"another process builds {self.folder}; wait for its end, or give a new folder")
        return not present

    def release(self) -> None:
        """Let other builds into the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def names(self, below: str = "") -> list[str]:
        """Names in the folder, or in the folder `below` it; empty if that does not exist."""

        def list_names(files: Any, path: str) -> list[str]:
            try:
                paths = files.ls(path, detail=False)
            except FileNotFoundError:
                return []
            return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

        return self._call(below, list_names)

    def read(self, name: str) -> bytes | None:
        """A small file, or None if it does not exist."""
        with self._naming(name):
            try:
                return read_bytes(self._url(name))
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if it does not exist."""

        def find_size(files: Any, path: str) -> int | None:
            try:
                return int(files.info(path)["size"])
            except FileNotFoundError:
                return None

        return self._call(name, find_size)

    def sha256(self, name: str) -> str:
        """Digest of a file as it is stored."""

        def hash_file(files: Any, path: str) -> str:
            digest = hashlib.sha256()
            with files.open(path, "rb") as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
            return digest.hexdigest()

        return self._call(name, hash_file)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        if not self._local:
            self._call(name, lambda files, path: files.pipe_file(path, data))
            return
        with self._naming(name), self.scratch(name) as path:
            path.write_bytes(data)
            self.publish(path, name)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yield a local path where file `name` is written before `publish`; it is removed afterwards."""
        file = name.rpartition("/")[2]
        if not self._local:
            with scratch_folder("shard") as folder:
                yield folder / file
            return
        path = Path(self._at(BUILD), f"{file}.{uuid4().hex}")  # the suffix tells it from finished files
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, path: Path, name: str) -> None:
        """Move or upload a complete scratch file to its name."""
        if not self._local:
            self._call(name, lambda files, target: files.put_file(str(path), target))
            return
        with self._naming(name):
            rename_durably(path, Path(self._at(name)))

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it exists."""
        with self._naming(name):
            remove(self._url(name))

    def remove_empty(self) -> None:
        """Remove the folder itself if it is empty."""
        if self._local:
            with contextlib.suppress(OSError):
                os.rmdir(self._root)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else str(self._root)

    def _url(self, name: str) -> str:
        return join(self.folder, name) if name else self.folder

    def _call(self, name: str, action: Callable[[Any, str], T]) -> T:
        """`call_store` for a file of the folder, with a ShardError."""
        with self._naming(name):
            return call_store(self._url(name), action)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Turn an OSError into a ShardError that names the file."""
        try:
            yield
        except OSError as error:
            reason = error_reason(error)
            raise ShardError(
                f"cannot write {self._url(name)}: {reason}; fix that and run the same command again"
            ) from None
