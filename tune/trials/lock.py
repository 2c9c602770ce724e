"""One process at a time runs a sweep: it holds the lock on the sweep's folder, and only then writes the ledger.

A lock of a process that was killed blocks nobody. A process that has lost its lock, because it was suspended for long
and another host continued the sweep, stops itself with a SweepError.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.errors import RunError, SweepError
from pipeline.files.folder_lock import FolderLock, Owner
from pipeline.logs import get_logger
from tune.search.ledger import Ledger, read_ledger, write_ledger
from tune.trials.check import CheckedSweep

WriteLedger = Callable[[str, Ledger], None]  # to the sweep's folder

log = get_logger("sweep")


def stop_process() -> None:
    """Send this process SIGTERM, at which Ray ends the running trials."""
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def hold_sweep(checked: CheckedSweep, stop: Callable[[], None] = stop_process) -> Iterator[WriteLedger]:
    """Hold the sweep's lock; yields the function that writes its ledger, which raises SweepError without the lock.

    Args:
        checked: the sweep.
        stop: called in another thread if the lock is lost.

    Raises:
        RunError: another process runs the sweep, or has changed it since it was checked.
    """
    folder = checked.space.base.storage
    lost: list[str] = []

    def lose(owner: Owner) -> None:
        lost.append(f"sweep {folder} is now run by {owner}; this process has stopped")
        log.error("%s", lost[0])
        stop()

    def write(to: str, ledger: Ledger) -> None:
        if lost:
            raise SweepError(lost[0])
        write_ledger(to, ledger)

    with FolderLock(folder, lose):
        if read_ledger(folder) != checked.stored:
            raise RunError(f"sweep {folder} was changed by another process a moment ago; run the same command again")
        yield write
