"""The folder that a build writes, local or behind a URL that fsspec knows; nothing is written outside of it.

A local file appears under its name when it is complete (renamed), a remote one as its store does it; either way a build
trusts a tar only if its receipt and sha256 hold, and readers a folder only if its `index.json` is there. Faults are
`ShardError`s that name the file.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import fsspec

from pipeline.errors import PipelineError, ShardError
from pipeline.files.credentials import refuse_login
from pipeline.files.scratch import scratch_folder
from pipeline.files.shard_files import is_url
from pipeline.files.storage import rename_durably

BUILD = ".build"  # inside of the folder while it is unfinished: receipts and half-written files
CHUNK = 2**22  # bytes hashed at a time


class Output:
    """Write access to one shard folder; each process makes its own."""

    def __init__(self, folder: str) -> None:
        """Raises ShardError for `pipe:` and a URL that no package here writes, ConfigError for one with a login."""
        self.folder = folder.rstrip("/") if len(folder) > 1 else folder
        self._local = not is_url(folder)
        refuse_login(folder, "the address of the shards")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.folder)
        except (ValueError, ImportError) as error:
            raise ShardError(f"no writer for '{folder}': {error}") from None

    def prepare(self) -> bool:
        """Make the folder and its `.build`; True if it was empty or new.

        Raises:
            ShardError: it holds something that is no unfinished build, or cannot be written.
        """
        present = self.names()
        if present and (BUILD not in present or os.path.islink(self._at(BUILD))):
            raise ShardError(f"{self.folder} is not empty and no unfinished build; give a new folder")
        with self._naming(""):
            self._files.makedirs(self._at(BUILD), exist_ok=True)  # nothing on stores that have no folders
        return not present

    def names(self, below: str = "") -> list[str]:
        """What is in the folder, or in one below it; empty if that is not there."""
        self._files.invalidate_cache()
        with self._naming(below):
            try:
                paths = self._files.ls(self._at(below), detail=False)
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def read(self, name: str) -> bytes | None:
        """A small file, or None if it is not there."""
        with self._naming(name):
            try:
                return bytes(self._files.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if it is not there."""
        self._files.invalidate_cache()
        with self._naming(name):
            try:
                return int(self._files.info(self._at(name))["size"])
            except FileNotFoundError:
                return None

    def sha256(self, name: str) -> str:
        """Digest of a file as it is stored."""
        digest = hashlib.sha256()
        with self._naming(name), self._files.open(self._at(name), "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self._naming(name):
            if not self._local:
                self._files.pipe_file(self._at(name), data)
                return
            with self.scratch(name) as path:
                path.write_bytes(data)
                self.publish(path, name)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A local path where file `name` is written before `publish`; nothing is left there."""
        file = name.rpartition("/")[2]
        if not self._local:
            with scratch_folder("shard") as folder:
                yield folder / file
            return
        path = Path(self._at(BUILD), f"{file}.{uuid4().hex}")  # its end is no finished file's
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, path: Path, name: str) -> None:
        """Give a complete scratch file its name."""
        with self._naming(name):
            if self._local:
                rename_durably(path, Path(self._at(name)))
            else:
                self._files.put_file(str(path), self._at(name))

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        with self._naming(name):
            try:
                self._files.rm(self._at(name), recursive=True)
            except FileNotFoundError:
                return

    def remove_empty(self) -> None:
        """Remove the folder itself if nothing is in it."""
        if self._local:
            with contextlib.suppress(OSError):
                os.rmdir(self._root)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else str(self._root)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store has its own family of errors
            if isinstance(error, PipelineError) or (self._local and not isinstance(error, OSError)):
                raise
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            where = f"{self.folder}/{name}" if name else self.folder
            raise ShardError(f"cannot write {where}: {reason}; mend that and run the same command again") from None
