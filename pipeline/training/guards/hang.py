"""The hang detector: if a step does not end in time, it writes the stacks of this rank and ends the process.

Ray then restarts the worker group from the last checkpoint. Every rank has a detector and rearms it after each step.
Ranks wait for each other in collectives, so all of them report within moments: the hanging rank and the waiting ones.
The timeout of torch.distributed (30 minutes) ends a run too, but does not show where it hangs.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FLUSH_SECONDS = 5.0  # between the report and the exit, so that other ranks can report before Ray ends them
_BACKSTOP_SECONDS = 30.0  # after that, faulthandler's C code reports: an extension that hangs can block Python
_STDERR = 2  # the descriptor, which Ray has redirected to the rank's log file
_POLLS_PER_LIMIT = 50


class HangDetector:
    """Watches from its own thread while `watch` is active.

    Args:
        seconds: limit from one `rearm` to the next; 0 = no limit.
        rank: for the message and the file's name.
        folder: gets `hang_rank<rank>.txt`; the same text goes to the standard error, which Ray shows at the driver.
    """

    def __init__(self, seconds: float, rank: int, folder: Path) -> None:
        self._seconds = seconds
        self._rank = rank
        self._path = folder / f"hang_rank{rank}.txt"
        self._deadline: float | None = None  # None: not watching
        self._stopped = threading.Event()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the code inside the `with` block."""
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
        """Restart the time, after a finished step."""
        if self._seconds and not self._stopped.is_set():
            self._deadline = time.monotonic() + self._seconds
            limit = self._seconds + _FLUSH_SECONDS + _BACKSTOP_SECONDS
            faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not watch the code inside (evaluation, checkpoint), because its duration cannot be predicted."""
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
        while not self._stopped.wait(self._seconds / _POLLS_PER_LIMIT):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._report()
                time.sleep(_FLUSH_SECONDS)
                os._exit(1)  # a main thread that is stuck in a collective handles neither exceptions nor signals

    def _report(self) -> None:
        text = (
            f"rank {self._rank}: no step was finished for {self._seconds / 60:g} minutes (train.hang_minutes). The "
            "process ends, and the run continues from its last checkpoint. The stacks of its threads:"
        )
        with self._path.open("wb") as file:
            for descriptor in (file.fileno(), _STDERR):
                os.write(descriptor, f"{text}\n".encode())
                faulthandler.dump_traceback(descriptor, all_threads=True)
