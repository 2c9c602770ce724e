"""Work on actors of several nodes: the loss of a node costs time and no result."""

import time
from collections.abc import Callable, Iterator

import pytest
from support.cluster import several_nodes

from pipeline.config import ScalingConfig
from pipeline.inference.pool import run_on_actors

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_run_on_actors_lost_node_costs_no_result_although_nothing_replaces_it() -> None:
    def build() -> Callable[[range], Iterator[int]]:
        def work(items: range) -> Iterator[int]:
            for item in items:
                time.sleep(0.2)  # a node is lost in the middle of its part
                yield item * item

        return work

    with several_nodes(2) as cluster:
        found = []
        for pair in run_on_actors(build, 60, ScalingConfig(num_workers=2, use_gpu=False)):
            found.append(pair)
            if len(found) == 10:
                cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    assert sorted(found) == [(item, item * item) for item in range(60)]
