"""The driver's limits; whole runs are in integration/."""

import pytest

from pipeline.config import ScalingConfig
from pipeline.launch.cluster import TRAIN_SETTINGS
from pipeline.launch.driver import failure_limits


@pytest.mark.parametrize(("minutes", "tries"), [(0, 3), (14.5, 15)])
def test_a_lost_node_may_take_as_long_as_a_first_one(minutes: float, tries: int) -> None:
    """Each of Ray's tries waits for a minute."""
    limits = failure_limits(ScalingConfig(wait_minutes=minutes, max_failures=7))
    assert (limits.controller_failure_limit, limits.max_failures) == (tries, 7)
    assert TRAIN_SETTINGS["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "60"
