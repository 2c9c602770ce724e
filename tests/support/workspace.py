"""Shards, a config and a place for the runs of integration tests."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, load_config
from support.paths import ROOT


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


def arguments(settings: Mapping[str, object]) -> list[str]:
    """Settings as `key=value` of a command line, where text is taken as it is written."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
