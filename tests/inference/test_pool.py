"""The plan of a pool: every item exactly once, whatever their number and that of the workers."""

from itertools import chain

import pytest
import ray.util.client

from pipeline.config import ScalingConfig
from pipeline.errors import ResourceError
from pipeline.inference.pool import SMALLEST_PART, plan_parts, run_on_actors

ITEMS = (0, 1, 2, 3, 5, 8, 9, 17, 64, 100, 5000)
WORKERS = (1, 2, 3, 4, 7, 64)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("items", ITEMS)
def test_plan_parts_hold_every_item_once_in_order(items: int, workers: int) -> None:
    parts = plan_parts(items, workers)
    assert list(chain(*parts)) == list(range(items))
    assert all(len(part) for part in parts), "no part is empty"
    assert len(parts) >= min(items, workers), "every worker gets a part if there are enough items"


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("items", ITEMS)
def test_plan_parts_workers_of_equal_speed_end_within_one_small_part(items: int, workers: int) -> None:
    busy = [0] * workers
    for part in plan_parts(items, workers):
        busy[busy.index(min(busy))] += len(part)
    assert max(busy) - min(busy) <= SMALLEST_PART


def test_plan_parts_become_smaller() -> None:
    sizes = [len(part) for part in plan_parts(5000, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 313
    assert len(sizes) < 100


def test_run_on_actors_through_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    with pytest.raises(ResourceError, match="ray job submit"):
        next(run_on_actors(lambda: iter, 3, ScalingConfig()))
