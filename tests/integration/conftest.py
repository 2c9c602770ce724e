"""One data set, one Ray cluster and one MLflow database for all integration tests."""

from collections.abc import Iterator

import pytest
import ray
from support.workspace import Workspace

from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    for seed, (split, images) in enumerate({"train": 48, "val": 12}.items()):
        annotations, drawn = write_synthetic(folder / "raw" / split, images=images, seed=seed, size=96)
        build_shards(annotations, drawn, folder / split)
    return Workspace(folder)


@pytest.fixture(scope="module")  # not longer: tests elsewhere start a Ray of their own
def ray_two_cpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="WARNING")
    yield
    ray.shutdown()
