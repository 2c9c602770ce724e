"""The project's own error is found however Ray has wrapped it."""

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from support.ray_internals import WorkerHealthCheckFailedError

from pipeline.errors import ConfigError, NonFiniteError
from pipeline.launch.failures import describe_failure, find_cause, is_killed


class WrappedError(Exception):
    """Ray keeps what a task raised in `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("worker failed")
        self.cause = cause


def chained(last: Exception, first: Exception) -> Exception:
    last.__cause__ = first
    return last


def test_find_cause_wrapped_error_is_found() -> None:
    ours = ConfigError("fix this")
    for error in (
        ours,
        WrappedError(ours),
        chained(RuntimeError("gloo"), ours),
        WrappedError(chained(OSError("x"), ours)),
    ):
        assert find_cause([error]) is ours


def test_find_cause_several_errors_gives_the_first() -> None:
    ours = NonFiniteError("too many")
    assert find_cause([RuntimeError("connection reset"), ours, ConfigError("later")]) is ours
    assert find_cause([RuntimeError("connection reset")]) is None
    assert find_cause([]) is None


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        ({}, "no worker gave a reason"),
        ({0: RuntimeError("connection reset\nby peer")}, "rank 0: RuntimeError: connection reset"),
        ({0: KeyError()}, "rank 0: KeyError: KeyError()"),
        ({0: RuntimeError("reset"), 1: RayActorError()}, "the worker of rank 1 died"),
        ({0: WorkerHealthCheckFailedError("failed", RayActorError())}, "the worker of rank 0 died"),
        ({0: RuntimeError("reset"), 2: OutOfMemoryError("x")}, "rank 2: its node was out of memory"),
        ({0: RuntimeError("reset"), 1: ConfigError("first\nsecond")}, "first"),
    ],
)
def test_describe_failure_several_errors_gives_one_line(errors: dict[int, Exception], line: str) -> None:
    found = describe_failure(errors)
    assert line in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OutOfMemoryError("x"), True),
        (WorkerHealthCheckFailedError("failed", RayActorError()), True),
        (RuntimeError("reset"), False),
    ],
)
def test_is_killed_is_true_for_deaths_of_a_process_only(error: Exception, expected: bool) -> None:
    assert is_killed([KeyError(), error]) is expected
    assert not is_killed([])
