"""Every value of the spaces for two cores builds a model that trains a step; those for COCO build, without memory."""

from typing import Any

import pytest
import torch
from support.model import padded_images, random_targets

from pipeline.config import Config
from pipeline.model import build_criterion, build_model
from tune.load import SPACES, load_space
from tune.space import Space

NAMES = sorted(path.stem for path in SPACES.glob("*.yaml"))


def configs_of(space: Space) -> list[Config]:
    """One config for each probed value of each axis, the other axes at their first one; equal models count once."""
    first: dict[str, Any] = {axis.label: axis.domain.probes[0] for axis in space.axes}
    rows = [first | {axis.label: value} for axis in space.axes for value in axis.domain.probes]
    configs = [space.config(values, "trial") for values in rows]
    return list({(str(each.model), str(each.loss)): each for each in configs}.values())


@pytest.mark.parametrize("name", [name for name in NAMES if "demo" in name])
def test_demo_space_each_value_trains_a_step(name: str) -> None:
    images, mask = padded_images((64, 64), (48, 64))
    for config in configs_of(load_space(name)):
        model, criterion = build_model(config.model).train(), build_criterion(config.loss)
        loss = criterion.total(criterion(model(images, mask), random_targets(2, 1), 3.0))
        loss.backward()
        assert loss.isfinite()


@pytest.mark.parametrize("name", [name for name in NAMES if "demo" not in name])
def test_coco_space_each_value_builds(name: str) -> None:
    for config in configs_of(load_space(name)):
        with torch.device("meta"):
            model = build_model(config.model, load_backbone=False)
        assert sum(weight.numel() for weight in model.parameters()) > 30e6
