"""Who holds the others up."""

from pathlib import Path

import pytest
from support.distributed import run_ranks

from pipeline.runtime import Runtime, single
from pipeline.training.monitoring.stragglers import PATIENCE, SHARE, Straggler, StragglerWatch, gathered, slowest


def test_the_slowest_rank_and_its_lag_behind_the_median_of_the_others() -> None:
    assert slowest([0.1, 0.2, 0.9, 0.3]) == Straggler(2, pytest.approx(0.7))
    assert slowest([0.5, 0.2]) == Straggler(0, pytest.approx(0.3))
    assert slowest([0.5]) is None
    even = slowest([0.2, 0.2, 0.2])
    assert even is not None
    assert even.lag == 0


def gather(runtime: Runtime) -> list[list[float]]:
    return gathered([runtime.rank + 0.25, 1e9 + runtime.rank], runtime)


def test_numbers_of_all_ranks_reach_all_ranks(tmp_path: Path) -> None:
    expected = [[0.25, 1e9], [1.25, 1e9 + 1]]
    assert run_ranks(gather, 2, tmp_path) == [expected, expected]
    assert gathered([1.5], single()) == [[1.5]]


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ([(1, 0.2)] * PATIENCE, 1),
        ([(1, 0.2)] * 10 * PATIENCE, 1),  # once is enough
        ([(1, 0.2)] * (PATIENCE - 1) + [(0, 0.2)] + [(1, 0.2)] * (PATIENCE - 1), 0),
        ([(1, 0.2)] * (PATIENCE - 1) + [(1, SHARE / 2)] + [(1, 0.2)] * (PATIENCE - 1), 0),
        ([(1, 0.2)] * PATIENCE + [(0, 0.2)] * PATIENCE, 2),
    ],
)
def test_a_warning_after_several_intervals_in_a_row(
    seen: list[tuple[int, float]], told: int, caplog: pytest.LogCaptureFixture
) -> None:
    watch = StragglerWatch()
    for rank, lag in seen:
        watch.see(Straggler(rank, lag), step_seconds=1.0)
    watch.see(None, 1.0)
    assert len(caplog.records) == told
    if told:
        assert "rank 1 holds the others up" in caplog.text
        assert "0.2 s longer per step than theirs, 20% of the step" in caplog.text
