"""Retries: the number of attempts, the pauses, and which errors are raised at once."""

import random
from errno import ENOSPC

import pytest

from pipeline.errors import ShardError
from pipeline.files import retry
from pipeline.files.retry import ATTEMPTS, FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS, call_with_retries

FULL = OSError(ENOSPC, "no space")


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
def test_call_with_retries_passing_fault_returns_result(pauses: list[float], times: int) -> None:
    calls, action = failing(times, OSError("reset"))
    assert call_with_retries(action) == "done"  # type: ignore[arg-type]
    assert len(calls) == times + 1
    assert len(pauses) == times
    assert all(0 <= pause <= min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**k) for k, pause in enumerate(pauses))


def test_call_with_retries_pauses_grow_and_differ(pauses: list[float]) -> None:
    for _ in range(200):
        call_with_retries(failing(ATTEMPTS - 1, TimeoutError())[1])  # type: ignore[arg-type]
    means = [sum(pauses[k :: ATTEMPTS - 1]) / 200 for k in range(ATTEMPTS - 1)]
    assert means == sorted(means)
    assert len(set(pauses)) == len(pauses), "processes that fail together must not retry together"


def test_call_with_retries_lasting_fault_is_raised_unchanged(pauses: list[float]) -> None:
    calls, action = failing(99, ConnectionError("gone"))
    with pytest.raises(ConnectionError, match="gone"):
        call_with_retries(action)  # type: ignore[arg-type]
    assert len(calls) == ATTEMPTS


class NoCredentialsError(Exception):
    """As botocore names it."""


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        PermissionError(),
        ImportError(),
        ShardError("x"),
        OSError(ENOSPC, "full"),
        NoCredentialsError(),
    ],
)
def test_call_with_retries_permanent_fault_is_raised_at_once(pauses: list[float], error: Exception) -> None:
    calls, action = failing(99, error)
    with pytest.raises(type(error)):
        call_with_retries(action)  # type: ignore[arg-type]
    assert len(calls) == 1
    assert pauses == []


def test_call_with_retries_keeps_global_random_state(pauses: list[float]) -> None:
    random.seed(0)
    state = random.getstate()
    call_with_retries(failing(2, OSError())[1])  # type: ignore[arg-type]
    assert random.getstate() == state
