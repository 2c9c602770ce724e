"""One process at a time runs a run: it holds the lock on the run's folder before it writes there, until its end.

A lock of a process that was killed blocks nobody (`pipeline.files.folder_lock`). A process that has lost its lock,
because it was suspended for long and another host continued the run, ends with a LostRunError and writes no more. Only
the process of the driver counts: Ray ends the workers of a driver that was killed, within seconds.
"""

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import LostRunError
from pipeline.files.folder_lock import POLL_SECONDS, FolderLock, Owner, find_owner
from pipeline.launch.resume_check import Resume
from pipeline.logs import get_logger

THEN = {"no": "continue with --resume", "must": "continue with --resume", "auto": "run the same command again"}

log = get_logger("run_lock")
_held: dict[str, "HeldRun"] = {}  # by this process


class HeldRun:
    """A run whose lock this process holds, as far as it knows.

    Args:
        folder: of the run, path or URL.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._taker: Owner | None = None

    def lose(self, owner: Owner) -> None:
        """Note the process that has taken over."""
        self._taker = owner
        log.error("run %s is now run by %s; this process stops", self._folder, owner)

    def check(self) -> None:
        """Raises LostRunError if another process has taken over the run."""
        if self._taker is not None:
            raise LostRunError(f"run {self._folder} is now run by {self._taker}; this process has stopped")

    @contextmanager
    def checked(self) -> Iterator[None]:
        """A context whose errors, and whose end, are a LostRunError if another process has taken over the run."""
        try:
            yield
        finally:
            self.check()


@contextmanager
def hold_run(folder: str, resume: Resume) -> Iterator[HeldRun]:
    """Hold the lock on a run's folder within a context; a process that holds it already goes on holding it.

    Args:
        folder: of the run, path or URL.
        resume: as the command was started, for its advice.

    Raises:
        RunError: another process runs the run, or the lock cannot be written.
    """
    if folder in _held:  # `jobs.finetune` holds it through all of its stages
        yield _held[folder]
        return
    held = HeldRun(folder)
    with FolderLock(folder, held.lose, THEN[resume]):
        _held[folder] = held
        try:
            yield held
        finally:
            del _held[folder]


def wait_for_owner(folder: str, seconds: float) -> None:
    """Wait for the end of a process that holds the lock on a run's folder; after so many seconds `hold_run` refuses."""
    deadline, said = time.monotonic() + seconds, False
    with contextlib.suppress(OSError):  # the checks of the run give its reason
        while time.monotonic() < deadline and (owner := find_owner(folder)):
            if not said:
                log.info("run %s is in use by %s: waiting up to %.0f s for its end", folder, owner, seconds)
            said = True
            time.sleep(POLL_SECONDS)
