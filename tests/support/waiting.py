"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable

WAIT_SECONDS = 60  # what takes a moment takes that long on no machine


def wait_until(condition: Callable[[], object], repeat: Callable[[], object] = lambda: None) -> None:
    """Return once `condition()` is true; `repeat()` is called before each new look at it.

    Raises:
        AssertionError: it did not become true.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not true after {WAIT_SECONDS} s"
        repeat()
        time.sleep(0.01)
