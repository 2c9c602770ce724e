"""Long work that can be interrupted: the first SIGTERM or Ctrl-C asks it to stop, a second Ctrl-C ends it at once.

Outside the main thread (a Tune trial) signals cannot be caught; Ray ends the process there.
"""

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar

from pipeline.logs import get_logger

log = get_logger("interrupt")
T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 1.0  # a signal that another thread received does not wake the main thread


def run_interruptible(
    work: Callable[[], T], request_stop: Callable[[str], None], check: Callable[[], None] = lambda: None
) -> T:
    """Run `work` in another thread, and handle signals meanwhile if this is the main one; returns its result.

    Args:
        work: should end early after `request_stop` was called.
        request_stop: called once, with the signal's name; must return soon.
        check: called about once a second; its error abandons `work`.

    Raises:
        KeyboardInterrupt: a second Ctrl-C; `work` is abandoned.
        BaseException: whatever `work` raised.
    """
    outcome: Future[T] = Future()
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            asked.append(number)
            name = signal.Signals(number).name
            log.warning("%s: training stops after a checkpoint; Ctrl-C ends it at once", name)
            request_stop(name)

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # raised again in the thread that waits
            outcome.set_exception(error)

    caught = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, handle) for number in caught}
    try:
        threading.Thread(target=run, name="interruptible", daemon=True).start()
        while not outcome.done():
            _wait(outcome)
            check()
        return outcome.result()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(outcome: Future[T]) -> None:
    try:
        outcome.exception(timeout=POLL_SECONDS)
    except TimeoutError:
        return
