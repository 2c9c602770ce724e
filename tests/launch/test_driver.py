"""The driver's limits; whole runs are in integration/."""

import pytest

from pipeline.config import ScalingConfig
from pipeline.errors import PreemptedError
from pipeline.launch.cluster import TRAIN_SETTINGS
from pipeline.launch.driver import failure_limits, stop_after_end
from pipeline.runs.record import RunRecord


@pytest.mark.parametrize(("minutes", "tries"), [(0, 3), (14.5, 15)])
def test_a_lost_node_may_take_as_long_as_a_first_one(minutes: float, tries: int) -> None:
    """Each of Ray's tries waits for a minute."""
    limits = failure_limits(ScalingConfig(wait_minutes=minutes, max_failures=7))
    assert (limits.controller_failure_limit, limits.max_failures) == (tries, 7)
    assert TRAIN_SETTINGS["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "60"


@pytest.mark.parametrize(
    ("signals", "error"),
    [(["SIGINT"], KeyboardInterrupt), (["SIGTERM"], PreemptedError), (["SIGTERM", "SIGINT"], KeyboardInterrupt)],
)
def test_a_signal_after_the_last_step_ends_the_caller(signals: list[str], error: type[BaseException]) -> None:
    """Registration, reports and drawings must not begin after it."""
    with pytest.raises(error) as raised:
        stop_after_end(RunRecord("shapes", "runs/shapes", {}, None), signals)
    assert error is KeyboardInterrupt or "shapes has finished, and SIGTERM" in str(raised.value)


def test_a_run_without_signals_goes_on() -> None:
    stop_after_end(RunRecord("shapes", "runs/shapes", {}, None), [])
