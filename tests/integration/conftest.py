"""One data set, one Ray cluster and one MLflow database for all integration tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from support.paths import ROOT

from pipeline.config import Config, load_config
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic


@dataclass(frozen=True)
class Workspace:
    """Shards of 48 + 12 small images, and where runs go."""

    folder: Path

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def overrides(self, name: str) -> dict[str, object]:
        """The demo preset shrunk to a few seconds of training: 12 steps in two epochs."""
        return {
            "name": name,
            "storage": str(self.folder / "runs"),
            "data.train": str(self.folder / "train"),
            "data.val": str(self.folder / "val"),
            "data.augment.scales": [96],
            "data.augment.eval_size": 96,
            "data.augment.max_size": 160,
            "model.hidden_dim": 32,
            "model.heads": 4,
            "model.ffn_dim": 32,
            "model.queries": 10,
            "model.dropout": 0.1,
            "model.backbone.width": 8,
            "train.epochs": 2,
            "train.micro_batch": 2,
            "train.log_steps": 1,
            "evaluation.where": "inline",
            "tracking.uri": self.tracking_uri,
            "tracking.register_as": "",
        }

    def config(self, name: str, **changes: object) -> Config:
        """The config of run `name`; dots in keys are written as double underscores."""
        named = {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(ROOT / "jobs" / "configs" / "demo.yaml", {**self.overrides(name), **named})


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    for seed, (split, images) in enumerate({"train": 48, "val": 12}.items()):
        annotations, pictures = write_synthetic(folder / "raw" / split, images=images, seed=seed, size=96)
        build_shards(annotations, pictures, folder / split)
    return Workspace(folder)


@pytest.fixture(scope="module")  # not longer: tests elsewhere start a Ray of their own
def ray_two_cpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="WARNING")
    yield
    ray.shutdown()
