"""The progress line: rewritten on a terminal, logged at a bounded rate elsewhere."""

import io
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.launch import ticker
from pipeline.launch.ticker import CLEAR, PLAIN_SECONDS, Ticker, show_progress
from pipeline.training.stopping import ControlChannel


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_ticker_terminal_rewrites_one_line() -> None:
    stream = Terminal()
    shown = Ticker(stream)
    for now, line in enumerate(["step 1", "step 2", "step 2", ""]):
        shown.show([], line, now)
    assert stream.getvalue() == f"{CLEAR}step 1\r{CLEAR}step 2\r{CLEAR}\r"


def test_ticker_kept_lines_stay_above_the_line() -> None:
    stream = Terminal()
    shown = Ticker(stream)
    shown.show([], "step 1", 0)
    shown.show(["epoch 1 evaluated"], "step 1", 1)
    shown.close()
    assert stream.getvalue() == f"{CLEAR}step 1\r{CLEAR}epoch 1 evaluated\nstep 1\r{CLEAR}"


def test_ticker_narrow_terminal_cuts_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    stream = Terminal()
    Ticker(stream).show([], "0123456789", 0)
    assert stream.getvalue() == f"{CLEAR}012345678\r"


def test_ticker_without_terminal_logs_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stream = io.StringIO()
    shown = Ticker(stream)
    for second in range(100):
        shown.show([], f"step {second}", second)
    shown.show([], "step 99", 200)  # nothing new
    assert stream.getvalue() == ""
    steps = [int(record.message.split()[1]) for record in caplog.records]
    assert steps == [*range(0, 100, int(PLAIN_SECONDS)), 99]
    caplog.clear()
    shown.show(["epoch 1 evaluated"], "step 101", 200)
    shown.close()
    shown.close()
    assert [record.message for record in caplog.records] == ["epoch 1 evaluated", "step 101"]


def test_show_progress_shows_posted_lines_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what was posted just before the run ended, and nothing twice; Ray is faked."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(ticker, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ticker.ray, "get", lambda answer, timeout: answer)
    control = ControlChannel("")
    handle: Any = SimpleNamespace(drain_progress=SimpleNamespace(remote=control.drain_progress))
    with show_progress(handle):
        control.post_progress("step 1")
        control.post_progress("epoch 1 evaluated", keep=True)
        control.post_progress("step 2")
    messages = [record.message for record in caplog.records]
    assert messages.count("epoch 1 evaluated") == 1
    assert messages[-1] == "step 2"


def test_show_progress_without_ray_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(answer: Any, timeout: float) -> Any:
        raise ConnectionError

    monkeypatch.setattr(ticker.ray, "get", gone)
    with show_progress(SimpleNamespace(drain_progress=SimpleNamespace(remote=lambda: None))):
        pass
