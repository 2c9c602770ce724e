"""Long work that can be asked to stop: the first SIGTERM or Ctrl-C asks, a second Ctrl-C ends it at once.

Used by `driver.py` around the training run. Outside of a main thread (a Tune trial) there are no signals to catch, and
the work is simply done.
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
LOOK_SECONDS = 1.0  # signals wake the main thread by themselves; this is for those that another thread got


def run_interruptible(work: Callable[[], T], ask: Callable[[str], None]) -> T:
    """The result of `work`, which runs in a thread while the main thread takes signals.

    Args:
        work: what to do; it should come to an early end after `ask` was called.
        ask: called once, with the signal's name; must return soon.

    Raises:
        KeyboardInterrupt: a second Ctrl-C; `work` is left as it is.
        BaseException: whatever `work` raised.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    outcome: Future[T] = Future()
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            asked.append(number)
            name = signal.Signals(number).name
            log.warning("%s: training stops after a checkpoint; Ctrl-C ends it at once", name)
            ask(name)

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # the caller gets it, whatever it is
            outcome.set_exception(error)

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        threading.Thread(target=run, name="interruptible", daemon=True).start()
        while not outcome.done():
            _wait(outcome)
        return outcome.result()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(outcome: Future[T]) -> None:
    try:
        outcome.exception(timeout=LOOK_SECONDS)
    except TimeoutError:
        return
