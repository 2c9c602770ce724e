"""Temporary folders that are removed even if their process was killed: the next process that makes one removes them.

A folder is created in the temporary folder (TMPDIR). Its name contains the project and the host. Its process holds a
lock on it (`flock` on the folder itself, as https://systemd.io/TEMPORARY_DIRECTORIES asks), which the kernel releases
when the process ends. So a folder of that form whose lock is free is abandoned. A temporary folder that cannot be
written is a StorageError.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import storage_error
from pipeline.logs import get_logger

log = get_logger("scratch")


class Scratch:
    """A new, empty temporary folder; `close` or the end of its context removes it.

    Args:
        purpose: a lower-case word that becomes part of the folder's name.

    Raises:
        StorageError: the temporary folder cannot be written.
    """

    def __init__(self, purpose: str) -> None:
        sweep()
        self._descriptor: int | None = None
        while self._descriptor is None:  # another process may sweep a new folder before it is locked
            try:
                self.folder = Path(tempfile.mkdtemp(prefix=f"deformable-detr-{purpose}-{_host()}-"))
            except OSError as error:
                raise storage_error(f"no temporary folder: {error}; set TMPDIR to a disk with space", error) from None
            self._descriptor = lock_folder(self.folder)

    def close(self) -> None:
        """Remove the folder and its content; a second call does nothing."""
        if self._descriptor is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Yield the folder of a `Scratch`, which is removed at the end of the context."""
    with Scratch(purpose) as scratch:
        yield scratch.folder


def sweep() -> list[Path]:
    """Remove abandoned folders of this user and host; returns the removed folders."""
    form = re.compile(rf"deformable-detr-[a-z]+-{_host()}-[a-z0-9_]{{8}}")
    removed = []
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if not form.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):  # removed meanwhile, or of another user
                if (
                    entry.stat().st_uid == os.getuid()
                    and (descriptor := lock_folder(Path(entry), required=True)) is not None
                ):
                    shutil.rmtree(entry, ignore_errors=True)
                    os.close(descriptor)
                    removed.append(Path(entry))
    if removed:
        log.info("removed %d temporary folders of processes that were killed, such as %s", len(removed), removed[0])
    return removed


def lock_folder(folder: Path, required: bool = False) -> int | None:
    """Lock the folder and return the descriptor; None if another process has the lock or removed the folder.

    Where folders cannot be locked (NFS), the descriptor is returned all the same unless `required`: nothing is swept
    there, so a temporary folder needs no lock.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        if not required:
            return descriptor
    os.close(descriptor)
    return None


def _host() -> str:
    """A hash of this host's name: hosts may share the folder, and not every network drive shares locks."""
    return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]
