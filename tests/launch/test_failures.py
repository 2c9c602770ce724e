"""The error of ours is found however it was wrapped."""

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipeline.errors import ConfigError, NonFiniteError
from pipeline.launch.failures import cause_of, describe_failure


class WrappedError(Exception):
    """Ray keeps what a task raised in `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("worker failed")
        self.cause = cause


def chained(last: Exception, first: Exception) -> Exception:
    last.__cause__ = first
    return last


def test_it_may_be_the_error_its_cause_or_what_ray_wrapped() -> None:
    ours = ConfigError("mend this")
    for error in (
        ours,
        WrappedError(ours),
        chained(RuntimeError("gloo"), ours),
        WrappedError(chained(OSError("x"), ours)),
    ):
        assert cause_of([error]) is ours


def test_the_first_of_several_and_none_of_none() -> None:
    ours = NonFiniteError("too many")
    assert cause_of([RuntimeError("connection reset"), ours, ConfigError("later")]) is ours
    assert cause_of([RuntimeError("connection reset")]) is None
    assert cause_of([]) is None


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        ({}, "no worker said why"),
        ({0: RuntimeError("connection reset\nby peer")}, "rank 0: RuntimeError: connection reset"),
        ({0: KeyError()}, "rank 0: KeyError: KeyError()"),
        ({0: RuntimeError("reset"), 1: RayActorError()}, "the worker of rank 1 died"),
        ({0: WorkerHealthCheckFailedError("failed", RayActorError())}, "the worker of rank 0 died"),
        ({0: RuntimeError("reset"), 2: OutOfMemoryError("x")}, "rank 2: its node was out of memory"),
        ({0: RuntimeError("reset"), 1: ConfigError("first\nsecond")}, "first"),
    ],
)
def test_describe_failure_is_one_line_of_the_most_telling_error(errors: dict[int, Exception], line: str) -> None:
    found = describe_failure(errors)
    assert line in found
    assert "\n" not in found
