"""Requests to stop a run; that the ranks agree is tested in engine/test_step.py."""

import os
import signal
from collections.abc import Iterator

import pytest
from ray.train import PreemptionInfo

from pipeline.training import stopping
from pipeline.training.stopping import NOTICE, NOTICE_STEPS, TERMINATED, ControlChannel, InterruptibleTorch, StopMonitor


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[PreemptionInfo | None]:
    """What Ray says at each question, in turn; None when there is nothing left to say."""
    answers: list[PreemptionInfo | None] = []
    monkeypatch.setattr(
        stopping.ray.train, "get_preemption_info", lambda: answers.pop(0) if answers else None, raising=True
    )
    return answers


@pytest.fixture
def sigterm() -> Iterator[list[int]]:
    """A handler from before `catch_sigterm`, which counts the signals."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)
    stopping._terminated.clear()


@pytest.mark.usefixtures("notices")
def test_should_stop_first_sigterm_requests_second_ends(sigterm: list[int]) -> None:
    monitor = StopMonitor(None, rank=1, elastic=False)
    stopping.catch_sigterm()
    assert not monitor.should_stop(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert monitor.should_stop(2)
    assert monitor.reason == TERMINATED
    assert sigterm == []
    os.kill(os.getpid(), signal.SIGTERM)  # the second one ends the process
    assert sigterm == [signal.SIGTERM]


def test_should_stop_preemption_notice_is_polled_every_few_steps(notices: list[PreemptionInfo | None]) -> None:
    notices += [None, PreemptionInfo(None, {"node": [0]})]
    monitor = StopMonitor(None, rank=0, elastic=False)
    answers = [monitor.should_stop(step) for step in range(2 * NOTICE_STEPS)]
    assert answers == [False] * NOTICE_STEPS + [True] * NOTICE_STEPS  # also without a new notice
    assert monitor.reason == NOTICE


def test_wants_checkpoint_elastic_run_saves_once_per_notice(notices: list[PreemptionInfo | None]) -> None:
    first, second = PreemptionInfo(1, {"a": [0]}), PreemptionInfo(1, {"a": [0], "b": [1]})
    notices += [None, first, first, second, None]
    monitor = StopMonitor(None, rank=0, elastic=True)
    saved = []
    for step in range(5 * NOTICE_STEPS):
        assert not monitor.should_stop(step)
        if monitor.wants_checkpoint():
            saved.append(step)
    assert saved == [NOTICE_STEPS, 3 * NOTICE_STEPS]


def test_request_stop_twice_keeps_first_reason() -> None:
    control = ControlChannel("")
    assert control.stop_reason() == ""
    control.request_stop("SIGTERM")
    control.request_stop("SIGINT")
    assert control.stop_reason() == "SIGTERM"


def test_interruptible_torch_installs_sigterm_handler_on_workers() -> None:
    """Ray calls a backend's `on_training_start` when its workers are up; the rest is Ray's own."""
    done = []

    class Group:
        def execute(self, function: object) -> None:
            done.append(function)

    config = InterruptibleTorch()
    config.backend_cls().on_training_start(Group(), config)
    assert done[-1] is stopping.catch_sigterm


def test_drain_progress_gives_kept_lines_once() -> None:
    control = ControlChannel("")
    assert control.drain_progress() == ([], "")
    control.post_progress("step 1")
    control.post_progress("epoch 1 evaluated", keep=True)
    control.post_progress("step 2")
    assert control.drain_progress() == (["epoch 1 evaluated"], "step 2")
    assert control.drain_progress() == ([], "step 2")
