"""Which rank delays the others, and when that is a warning."""

from pathlib import Path

import pytest
from support.distributed import run_ranks

from pipeline.runtime import Runtime, single
from pipeline.training.monitoring.stragglers import (
    WARN_INTERVALS,
    WARN_SHARE,
    Straggler,
    StragglerMonitor,
    find_straggler,
    gather_values,
)


def test_find_straggler_gives_lag_behind_median_of_others() -> None:
    assert find_straggler([0.1, 0.2, 0.9, 0.3]) == Straggler(2, pytest.approx(0.7))
    assert find_straggler([0.5, 0.2]) == Straggler(0, pytest.approx(0.3))
    assert find_straggler([0.5]) is None
    even = find_straggler([0.2, 0.2, 0.2])
    assert even is not None
    assert even.lag == 0


def gather(runtime: Runtime) -> list[list[float]]:
    return gather_values([runtime.rank + 0.25, 1e9 + runtime.rank], runtime)


def test_gather_values_two_ranks_get_the_same_table(tmp_path: Path) -> None:
    expected = [[0.25, 1e9], [1.25, 1e9 + 1]]
    assert run_ranks(gather, 2, tmp_path) == [expected, expected]
    assert gather_values([1.5], single()) == [[1.5]]


@pytest.mark.parametrize(
    ("seen", "warnings"),
    [
        ([(1, 0.2)] * WARN_INTERVALS, 1),
        ([(1, 0.2)] * 10 * WARN_INTERVALS, 1),  # once is enough
        ([(1, 0.2)] * (WARN_INTERVALS - 1) + [(0, 0.2)] + [(1, 0.2)] * (WARN_INTERVALS - 1), 0),
        ([(1, 0.2)] * (WARN_INTERVALS - 1) + [(1, WARN_SHARE / 2)] + [(1, 0.2)] * (WARN_INTERVALS - 1), 0),
        ([(1, 0.2)] * WARN_INTERVALS + [(0, 0.2)] * WARN_INTERVALS, 2),
    ],
)
def test_straggler_monitor_warns_after_several_intervals_in_a_row(
    seen: list[tuple[int, float]], warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = StragglerMonitor()
    for rank, lag in seen:
        monitor.update(Straggler(rank, lag), step_seconds=1.0)
    monitor.update(None, 1.0)
    assert len(caplog.records) == warnings
    if warnings:
        assert "rank 1 delays the other ranks" in caplog.text
        assert "0.2 s longer per step than theirs, 20% of the step" in caplog.text
