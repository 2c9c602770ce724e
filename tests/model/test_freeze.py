"""`model.freeze`: which weights stay, through the optimizer, the average and a checkpoint."""

from pathlib import Path

import pytest
import torch
from support.helpers import tiny_checkpoint, tiny_config
from support.model import small_config

from pipeline.config import Config, OptimConfig, override
from pipeline.engine.ema import WeightAverage
from pipeline.engine.optim import parameter_groups
from pipeline.errors import ConfigError
from pipeline.model import build_model

PREFIXES = {"backbone": "backbone.", "encoder": "transformer.encoder."}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("freeze"))


def config_of(weights: Path, freeze: str) -> Config:
    return override(tiny_config(), [f"model.init_from={weights}", f"model.freeze={freeze}"])


@pytest.mark.parametrize("parts", [["backbone"], ["encoder"], ["backbone", "encoder"]])
def test_freeze_stops_the_gradients_of_these_parts_alone(weights: Path, parts: list[str]) -> None:
    model = build_model(config_of(weights, f"[{', '.join(parts)}]").model)
    prefixes = tuple(PREFIXES[part] for part in parts)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert frozen


def test_freeze_keeps_the_weights_through_optimizer_and_average(weights: Path) -> None:
    model = build_model(config_of(weights, "[backbone]").model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = parameter_groups(model, OptimConfig())
    assert [group["name"] for group in groups] == ["main", "projection"]
    average = WeightAverage(model, 0.5)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    average.update(model, 1)
    for found in (model.state_dict(), average.model.state_dict()):
        same = {name for name in before if torch.equal(found[name], before[name])}
        assert {name for name in before if name.startswith("backbone.")} <= same
        assert "class_embed.0.weight" not in same


@pytest.mark.parametrize("freeze", ["backbone", "encoder"])
def test_freeze_of_weights_that_were_not_trained_is_refused(freeze: str) -> None:
    with pytest.raises(ConfigError, match="init_from"):
        override(tiny_config(), [f"model.freeze=[{freeze}]"])


def test_freeze_of_an_encoder_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="encoder"):
        override(Config(), ["model.name=faster_rcnn", "loss.classification=own", "model.init_from=x",
                            "model.freeze=[encoder]"])  # fmt: skip


def test_freeze_of_a_pretrained_backbone_needs_no_init_from() -> None:
    assert override(Config(), ["model.freeze=[backbone]"]).model.freeze == ("backbone",)
    assert small_config().freeze == ()
