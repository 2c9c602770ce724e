"""Signals at the driver: the first requests a stop, a second Ctrl-C ends; other threads only check."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from pipeline.errors import LostRunError
from pipeline.launch import interrupt
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


def test_run_interruptible_outside_main_thread_checks_and_leaves_signals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a trial of a sweep: one that another process has taken over ends without waiting for its work."""
    monkeypatch.setattr(interrupt, "POLL_SECONDS", 0.05)
    before, release = signal.getsignal(signal.SIGTERM), threading.Event()
    results: list[int] = []
    handlers: list[object] = []

    def check() -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        raise LostRunError("another process has it")

    def run() -> None:
        results.append(run_interruptible(lambda: 7, print))
        with pytest.raises(LostRunError):
            run_interruptible(lambda: release.wait(60), print, check)
        results.append(8)

    thread = threading.Thread(target=run)
    start = time.monotonic()
    thread.start()
    thread.join()
    release.set()
    assert results == [7, 8]
    assert time.monotonic() - start < 30
    assert handlers == [before]
