"""The hang detector: a step that does not end leaves the stacks of this rank behind, and the process ends.

Ray then restarts the worker group from the last checkpoint. On every rank `worker.py` rearms it after each step; ranks
wait for each other in collectives, so all of them report within moments, the guilty one and the waiting ones. Limits of
torch.distributed itself (30 minutes) end a run too, but say nothing about where.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LAST_WORDS = 5.0  # seconds between the stacks and the end: the other ranks write theirs before Ray ends them
_BACKSTOP = 30.0  # seconds after which C code does it, where a hanging extension never lets Python run
_STDERR = 2  # the descriptor: Ray has put the rank's log file behind it
_POLLS = 50  # how often within its limit the detector looks


class HangDetector:
    """Watches from a thread of its own between `start` and `stop`.

    Args:
        seconds: how long it may take from one `rearm` to the next; 0 = never mind.
        rank: for the message and the file's name.
        folder: gets `hang_rank<rank>.txt`; the same goes to the standard error, which Ray shows at the driver.
    """

    def __init__(self, seconds: float, rank: int, folder: Path) -> None:
        self._seconds = seconds
        self._rank = rank
        self._path = folder / f"hang_rank{rank}.txt"
        self._deadline: float | None = None  # None: not watching
        self._stopped = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what happens inside."""
        if not self._seconds:
            yield
            return
        thread = threading.Thread(target=self._watch, name="hang detector", daemon=True)
        self.rearm()
        thread.start()
        try:
            yield
        finally:
            self._disarm()
            self._stopped.set()
            thread.join()

    def rearm(self) -> None:
        """A step is done: the time starts again."""
        if self._seconds and not self._stopped.is_set():
            self._deadline = time.monotonic() + self._seconds
            faulthandler.dump_traceback_later(self._seconds + _LAST_WORDS + _BACKSTOP, exit=True, file=_STDERR)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch what happens inside (evaluation, checkpoint): it has no usual duration."""
        self._disarm()
        try:
            yield
        finally:
            self.rearm()

    def _disarm(self) -> None:
        self._deadline = None
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(self._seconds / _POLLS):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._report()
                time.sleep(_LAST_WORDS)
                os._exit(1)  # nothing milder ends a process whose main thread is stuck in a collective

    def _report(self) -> None:
        text = (
            f"rank {self._rank}: no step was finished for {self._seconds / 60:g} minutes (train.hang_minutes). The "
            "process ends, and the run goes on from its last checkpoint. Where its threads are:"
        )
        with self._path.open("wb") as file:
            for descriptor in (file.fileno(), _STDERR):
                os.write(descriptor, f"{text}\n".encode())
                faulthandler.dump_traceback(descriptor, all_threads=True)
