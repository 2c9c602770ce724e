"""The driver's record and limits; whole runs are in integration/."""

import pytest

from pipeline.checkpoint import TrainState
from pipeline.cluster import TRAIN_SETTINGS
from pipeline.config import ScalingConfig
from pipeline.driver import existing, failure_limits
from pipeline.runs import RunRecord
from pipeline.snapshot import Stored


@pytest.mark.parametrize(("minutes", "tries"), [(0, 3), (14.5, 15)])
def test_a_lost_node_may_take_as_long_as_a_first_one(minutes: float, tries: int) -> None:
    """Each of Ray's tries waits for a minute."""
    limits = failure_limits(ScalingConfig(wait_minutes=minutes, max_failures=7))
    assert (limits.controller_failure_limit, limits.max_failures) == (tries, 7)
    assert TRAIN_SETTINGS["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "60"


def test_a_record_names_only_checkpoints_that_are_there() -> None:
    def stored(step: int, ap: float | None) -> Stored:
        history = () if ap is None else ({"AP": ap, "step": float(step)},)
        return Stored(f"checkpoint_{step}", TrainState({}, (), "digest", 0, 0, step, step, history=history))

    metrics = {"val/AP": 0.5, "perf/images_per_s": 7.0}
    record = RunRecord(
        "run", "/runs/run", {}, last="/runs/run/checkpoint_9", best="/runs/run/checkpoint_1", metrics=metrics
    )
    kept = existing(record, [stored(1, 0.5), stored(2, 0.4), stored(3, None)])
    assert (kept.last, kept.best) == ("/runs/run/checkpoint_3", "/runs/run/checkpoint_1")
    assert kept.metrics == metrics
    better = existing(record, [stored(1, 0.5), stored(2, 0.6), stored(3, None)])  # a task said so after the last report
    assert better.best == "/runs/run/checkpoint_2"
    moved = existing(record, [stored(2, 0.6), stored(3, 0.1), stored(4, None)])
    assert (moved.last, moved.best) == ("/runs/run/checkpoint_4", "/runs/run/checkpoint_2")
    assert moved.metrics["val/AP"] == 0.6
    assert existing(record, [stored(4, None)]).best is None
    assert existing(record, []) == RunRecord("run", "/runs/run", {})
