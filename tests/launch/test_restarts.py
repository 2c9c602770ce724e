"""A restart is announced with its cause; there is no restart if another try would fail again."""

from types import SimpleNamespace

import pytest
from ray.train import ControllerError

from pipeline.errors import ConfigError, DiskFullError, NonFiniteError
from pipeline.launch.restarts import RestartCallback


class Lines:
    """In the place of the actor: what it got."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.post_progress = SimpleNamespace(remote=self._take)

    def _take(self, line: str, keep: bool) -> None:
        assert keep
        self.lines.append(line)


def refusal(callback: RestartCallback, *errors: Exception) -> Exception | None:
    """What the callback gave up with, or None if it lets the workers start again."""
    try:
        callback.after_exception(None, dict(enumerate(errors)))
    except ControllerError as error:
        return error.controller_failure
    return None


def test_restart_callback_counts_and_gives_the_cause() -> None:
    control = Lines()
    callback = RestartCallback(control, 2)
    for error in (NonFiniteError("too many\nin a row"), RuntimeError("gloo"), RuntimeError("gloo")):
        assert refusal(callback, error) is None
    assert control.lines == ["restart 1 of 2: too many", "restart 2 of 2: rank 0: RuntimeError: gloo"]


def test_restart_callback_without_limit_names_none() -> None:
    control = Lines()
    refusal(RestartCallback(control, -1), RuntimeError("gloo"))
    assert control.lines == ["restart 1: rank 0: RuntimeError: gloo"]


def test_after_exception_input_error_restarts_only_with_checkpoint() -> None:
    callback = RestartCallback(Lines(), 3)
    assert isinstance(refusal(callback, RuntimeError("gloo"), ConfigError("fp16")), ConfigError)
    callback.after_report(None, [{}], None)
    assert refusal(callback, ConfigError("fp16"))
    callback.after_report(None, [{}], SimpleNamespace(path="a"))
    assert refusal(callback, ConfigError("the store does not answer")) is None


@pytest.mark.parametrize("stored", [False, True])
def test_after_exception_full_disk_ends_the_run(stored: bool) -> None:
    callback = RestartCallback(Lines(), 3)
    if stored:
        callback.after_report(None, [{}], SimpleNamespace(path="a"))
    assert isinstance(refusal(callback, RuntimeError("gloo"), DiskFullError("no room")), DiskFullError)
