"""What a person sees of a run: one line that moves, or plain lines at a bounded rate."""

import io
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.launch import ticker
from pipeline.launch.ticker import CLEAR, PLAIN_SECONDS, Ticker, showing
from pipeline.training.stopping import Bell


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_that_is_rewritten() -> None:
    stream = Terminal()
    shown = Ticker(stream)
    for now, line in enumerate(["step 1", "step 2", "step 2", ""]):
        shown.show([], line, now)
    assert stream.getvalue() == f"{CLEAR}step 1\r{CLEAR}step 2\r{CLEAR}\r"


def test_lines_to_keep_stay_above_it() -> None:
    stream = Terminal()
    shown = Ticker(stream)
    shown.show([], "step 1", 0)
    shown.show(["epoch 1 evaluated"], "step 1", 1)
    shown.close()
    assert stream.getvalue() == f"{CLEAR}step 1\r{CLEAR}epoch 1 evaluated\nstep 1\r{CLEAR}"


def test_a_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    stream = Terminal()
    Ticker(stream).show([], "0123456789", 0)
    assert stream.getvalue() == f"{CLEAR}012345678\r"


def test_elsewhere_plain_lines_come_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
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


def test_the_driver_shows_what_the_bell_was_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what was told just before the run ended, and nothing twice; Ray's part is played here."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(ticker, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(ticker.ray, "get", lambda answer, timeout: answer)
    bell = Bell("")
    handle: Any = SimpleNamespace(told=SimpleNamespace(remote=bell.told))
    with showing(handle):
        bell.tell("step 1")
        bell.tell("epoch 1 evaluated", keep=True)
        bell.tell("step 2")
    messages = [record.message for record in caplog.records]
    assert messages.count("epoch 1 evaluated") == 1
    assert messages[-1] == "step 2"


def test_a_ray_that_is_gone_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(answer: Any, timeout: float) -> Any:
        raise ConnectionError

    monkeypatch.setattr(ticker.ray, "get", gone)
    with showing(SimpleNamespace(told=SimpleNamespace(remote=lambda: None))):
        pass
