"""Trying again: how often, after which pauses, and what is not tried again."""

import random

import pytest

from pipeline.errors import ShardError
from pipeline.files import retry
from pipeline.files.retry import ATTEMPTS, FIRST, LONGEST, retrying


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    return found


def failing(times: int, error: Exception) -> tuple[list[int], object]:
    calls: list[int] = []

    def action() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return calls, action


@pytest.mark.parametrize("times", range(ATTEMPTS))
def test_a_passing_fault_is_waited_out(pauses: list[float], times: int) -> None:
    calls, action = failing(times, OSError("reset"))
    assert retrying(action) == "done"  # type: ignore[arg-type]
    assert len(calls) == times + 1
    assert len(pauses) == times
    assert all(0 <= pause <= min(LONGEST, FIRST * 2**k) for k, pause in enumerate(pauses))


def test_pauses_grow_and_differ(pauses: list[float]) -> None:
    for _ in range(200):
        retrying(failing(ATTEMPTS - 1, TimeoutError())[1])  # type: ignore[arg-type]
    means = [sum(pauses[k :: ATTEMPTS - 1]) / 200 for k in range(ATTEMPTS - 1)]
    assert means == sorted(means)
    assert len(set(pauses)) == len(pauses), "processes that failed together do not come back together"


def test_a_lasting_fault_is_raised_as_it_is(pauses: list[float]) -> None:
    calls, action = failing(99, ConnectionError("gone"))
    with pytest.raises(ConnectionError, match="gone"):
        retrying(action)  # type: ignore[arg-type]
    assert len(calls) == ATTEMPTS


@pytest.mark.parametrize("error", [FileNotFoundError(), PermissionError(), ImportError(), ShardError("x")])
def test_what_would_fail_again_is_not_tried_again(pauses: list[float], error: Exception) -> None:
    calls, action = failing(99, error)
    with pytest.raises(type(error)):
        retrying(action)  # type: ignore[arg-type]
    assert len(calls) == 1
    assert pauses == []


def test_the_global_random_state_is_left_alone(pauses: list[float]) -> None:
    random.seed(0)
    state = random.getstate()
    retrying(failing(2, OSError())[1])  # type: ignore[arg-type]
    assert random.getstate() == state
