"""Signals at the driver: the first requests a stop, a second Ctrl-C ends; other threads just run the work."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from pipeline.launch.interrupt import run_interruptible


def signal_later(*numbers: int) -> Callable[[], None]:
    """Sends them to this process, one after the other, from another thread."""

    def send() -> None:
        for number in numbers:
            time.sleep(0.1)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread.join


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_interruptible_first_signal_requests_stop(number: signal.Signals) -> None:
    asked, stop = [], threading.Event()

    def ask(name: str) -> None:
        asked.append(name)
        stop.set()

    before = signal.getsignal(number)
    join = signal_later(number)
    assert run_interruptible(lambda: stop.wait(20), ask)
    join()
    assert asked == [number.name]
    assert signal.getsignal(number) is before


def test_run_interruptible_second_ctrl_c_does_not_wait() -> None:
    asked: list[str] = []
    join = signal_later(signal.SIGINT, signal.SIGINT)
    start = time.monotonic()
    release = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        run_interruptible(lambda: release.wait(60), asked.append)
    assert time.monotonic() - start < 30
    assert asked == ["SIGINT"]
    release.set()
    join()


def test_run_interruptible_second_sigterm_is_ignored() -> None:
    """Schedulers send SIGTERM repeatedly before they kill."""
    asked: list[str] = []
    join = signal_later(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)
    run_interruptible(lambda: time.sleep(1), asked.append)
    join()
    assert asked == ["SIGTERM"]


def test_run_interruptible_passes_results_and_errors() -> None:
    assert run_interruptible(lambda: 7, print) == 7
    with pytest.raises(ZeroDivisionError):
        run_interruptible(lambda: 1 // 0, print)


def test_run_interruptible_outside_main_thread_runs_in_place() -> None:
    seen: list[threading.Thread] = []
    thread = threading.Thread(target=lambda: run_interruptible(lambda: seen.append(threading.current_thread()), print))
    thread.start()
    thread.join()
    assert seen == [thread]
