"""The progress line at the driver: on a terminal one line that is rewritten, elsewhere plain lines now and then.

Rank 0 tells the run's `Bell` how far it is (`observer.py`), and a thread of the driver asks for it. What is worth
keeping, such as an evaluation's result, is printed as it comes.
"""

import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import ray

from pipeline.logs import get_logger

LOOK_SECONDS = 1.0  # between two questions
PLAIN_SECONDS = 15.0  # between two plain lines
CLEAR = "\r\x1b[K"  # back to the line's start, and erase it

log = get_logger("ticker")


class Ticker:
    """Shows progress on a stream.

    Args:
        stream: a terminal, or anything else: then lines go to the log.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._line = ""
        self._shown = ""
        self._time = -PLAIN_SECONDS

    def show(self, kept: Sequence[str], line: str, now: float) -> None:
        """Print `kept`, and `line` if its time has come.

        Args:
            kept: lines that stay.
            line: the newest progress line, or empty.
            now: seconds on any clock that only goes forward.
        """
        if self._terminal:
            if kept or line != self._shown:
                shown = line[: shutil.get_terminal_size().columns - 1]  # one that wraps cannot be rewritten
                # the cursor goes back, so that what workers say overwrites the line and does not follow it
                self._stream.write(CLEAR + "".join(f"{each}\n" for each in kept) + f"{shown}\r")
                self._stream.flush()
                self._shown = line
            return
        for each in kept:
            log.info("%s", each)
        self._line = line
        if now - self._time >= PLAIN_SECONDS:
            self._tell(now)

    def close(self) -> None:
        """The last plain line is printed; the one on a terminal goes."""
        if not self._terminal:
            self._tell(self._time)
        elif self._shown:
            self._stream.write(CLEAR)
            self._stream.flush()
            self._shown = ""

    def _tell(self, now: float) -> None:
        if self._line and self._line != self._shown:
            log.info("%s", self._line)
            self._shown, self._time = self._line, now


@contextmanager
def showing(bell: Any) -> Iterator[None]:
    """Show on the standard error what a run tells the actor `bell`, while the caller waits for the run inside."""
    ticker, ended = Ticker(sys.stderr), threading.Event()

    def follow() -> None:
        while True:
            last = ended.wait(LOOK_SECONDS)
            try:
                kept, line = ray.get(bell.told.remote(), timeout=30)
                ticker.show(kept, line, time.monotonic())
            except Exception:  # Ray is gone, or too busy: the run matters, not its progress line
                if last or not ray.is_initialized():
                    break
            if last:
                break
        ticker.close()

    thread = threading.Thread(target=follow, name="ticker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=60)
