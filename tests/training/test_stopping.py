"""Who may ask a run to stop; that the ranks agree is in test_engine.py."""

import os
import signal
from collections.abc import Iterator

import pytest
from ray.train import PreemptionInfo

from pipeline.training import stopping
from pipeline.training.stopping import NOTICE, NOTICE_STEPS, TERMINATED, Bell, InterruptibleTorch, StopWatch


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
    """SIGTERM handled as by whoever was there before: counted."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)
    stopping._terminated.clear()


@pytest.mark.usefixtures("notices")
def test_sigterm_is_a_wish_once(sigterm: list[int]) -> None:
    watch = StopWatch(None, rank=1, elastic=False)
    stopping.catch_sigterm()
    assert not watch.asked(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.asked(2)
    assert watch.reason == TERMINATED
    assert sigterm == []
    os.kill(os.getpid(), signal.SIGTERM)  # whoever is not content with a wish
    assert sigterm == [signal.SIGTERM]


def test_rays_notice_is_asked_for_every_few_steps(notices: list[PreemptionInfo | None]) -> None:
    notices += [None, PreemptionInfo(None, {"node": [0]})]
    watch = StopWatch(None, rank=0, elastic=False)
    wishes = [watch.asked(step) for step in range(2 * NOTICE_STEPS)]
    assert wishes == [False] * NOTICE_STEPS + [True] * NOTICE_STEPS  # and it does not forget
    assert watch.reason == NOTICE


def test_an_elastic_run_saves_once_per_notice_and_stays(notices: list[PreemptionInfo | None]) -> None:
    first, second = PreemptionInfo(1, {"a": [0]}), PreemptionInfo(1, {"a": [0], "b": [1]})
    notices += [None, first, first, second, None]
    watch = StopWatch(None, rank=0, elastic=True)
    saved = []
    for step in range(5 * NOTICE_STEPS):
        assert not watch.asked(step)
        if watch.wants_checkpoint():
            saved.append(step)
    assert saved == [NOTICE_STEPS, 3 * NOTICE_STEPS]


def test_a_bell_keeps_its_first_reason() -> None:
    bell = Bell("")
    assert bell.reason() == ""
    bell.ring("SIGTERM")
    bell.ring("SIGINT")
    assert bell.reason() == "SIGTERM"


def test_every_worker_is_told_to_catch_sigterm() -> None:
    """Ray calls a backend's `on_training_start` when its workers are up; the rest is Ray's own."""
    done = []

    class Group:
        def execute(self, function: object) -> None:
            done.append(function)

    config = InterruptibleTorch()
    config.backend_cls().on_training_start(Group(), config)
    assert done[-1] is stopping.catch_sigterm


def test_the_bell_carries_what_the_run_says() -> None:
    bell = Bell("")
    assert bell.told() == ([], "")
    bell.tell("step 1")
    bell.tell("epoch 1 evaluated", keep=True)
    bell.tell("step 2")
    assert bell.told() == (["epoch 1 evaluated"], "step 2")
    assert bell.told() == ([], "step 2")
