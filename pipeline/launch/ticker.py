"""The progress line at the driver: on a terminal one line that is rewritten, elsewhere a plain line every 15 s.

Rank 0 posts its progress to the run's `ControlChannel`, and a thread of the driver reads it from there. Lines that
stay, such as the result of an evaluation, are printed at once. If Ray does not answer, nothing is shown.
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

POLL_SECONDS = 1.0  # between two questions to the ControlChannel
PLAIN_SECONDS = 15.0  # between two plain lines
CLEAR = "\r\x1b[K"  # move to the start of the line and erase it

log = get_logger("ticker")


class Ticker:
    """Shows progress on a stream.

    Args:
        stream: a terminal; for any other stream lines go to the log.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._line = ""
        self._shown = ""
        self._time = -PLAIN_SECONDS

    def show(self, kept: Sequence[str], line: str, now: float) -> None:
        """Print `kept`, and `line` if it is due.

        Args:
            kept: lines that stay.
            line: the newest progress line, or empty.
            now: seconds on any clock that only goes forward.
        """
        if self._terminal:
            if kept or line != self._shown:
                shown = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be rewritten
                # The cursor moves back, so that messages of workers overwrite the line instead of following it.
                self._stream.write(CLEAR + "".join(f"{each}\n" for each in kept) + f"{shown}\r")
                self._stream.flush()
                self._shown = line
            return
        for each in kept:
            log.info("%s", each)
        self._line = line
        if now - self._time >= PLAIN_SECONDS:
            self._log_line(now)

    def close(self) -> None:
        """Print the last plain line, or remove the line on a terminal."""
        if not self._terminal:
            self._log_line(self._time)
        elif self._shown:
            self._stream.write(CLEAR)
            self._stream.flush()
            self._shown = ""

    def _log_line(self, now: float) -> None:
        if self._line and self._line != self._shown:
            log.info("%s", self._line)
            self._shown, self._time = self._line, now


@contextmanager
def show_progress(control: Any) -> Iterator[None]:
    """Show a run's progress on the standard error while the caller waits for the run inside the `with` block.

    Args:
        control: handle of the run's ControlChannel.
    """
    ticker, ended = Ticker(sys.stderr), threading.Event()

    def follow() -> None:
        while True:
            last = ended.wait(POLL_SECONDS)
            try:
                kept, line = ray.get(control.drain_progress.remote(), timeout=30)
                ticker.show(kept, line, time.monotonic())
            except Exception:  # Ray is gone or too busy; the progress line must not end the run
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
