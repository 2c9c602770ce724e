"""A search space on disk, for the checks and the start of a sweep."""

from pathlib import Path

import pytest
import yaml

AXES = {"optim.lr": {"loguniform": [1e-4, 1e-3]}, "optim.drop_epochs": {"choice": [[1], [2]]}}


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("tracking: {register_as: detector}\n")
    path = tmp_path / "space.yaml"
    space = {"config": "base.yaml", "overrides": {"name": "sweep", "train.epochs": 4}, "space": AXES}
    path.write_text(yaml.safe_dump(space, sort_keys=False))
    return path
