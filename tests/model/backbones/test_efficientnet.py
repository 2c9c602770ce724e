"""EfficientNet as a backbone: torchvision's features, its weights, and batch norms that no batch changes."""

from pathlib import Path

import pytest
import torch
import torchvision

from pipeline.config import BackboneConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.backbones.build import build_backbone
from pipeline.model.backbones.efficientnet import EfficientNet
from pipeline.model.backbones.norms import FrozenBatchNorm2d

CHANNELS = {"efficientnet_b0": (24, 40, 112, 320), "efficientnet_b6": (40, 72, 200, 576)}  # arXiv 1905.11946


@pytest.mark.parametrize("norm", ["frozen_batch", "group"])
@pytest.mark.parametrize("name", CHANNELS)
def test_efficientnet_channels_and_strides(name: str, norm: str) -> None:
    backbone = EfficientNet(name, norm)
    maps = backbone.pyramid(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (channels, 64 // stride, 96 // stride) for channels, stride in zip(CHANNELS[name], (4, 8, 16, 32), strict=True)
    ]
    assert (backbone.pyramid_channels, backbone.channels) == (CHANNELS[name], CHANNELS[name][1:])
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())


def trained(name: str) -> torch.nn.Module:
    """Torchvision's classifier with batch norms of random values."""
    torch.manual_seed(0)
    model: torch.nn.Module = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b5"])  # from B5 on the norms have another epsilon
@torch.no_grad()
def test_efficientnet_features_equal_torchvision(name: str, tmp_path: Path) -> None:
    model = trained(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone(BackboneConfig.model_validate({"name": name, "weights": str(tmp_path / "weights.pth")}))
    images = torch.randn(2, 3, 64, 64)
    expected = [images]
    for block in model.get_submodule("features"):  # type: ignore[operator]
        expected.append(block(expected[-1]))
    for found, at in zip(backbone.train()(images), (4, 6, 8), strict=True):
        torch.testing.assert_close(found, expected[at], rtol=1e-3, atol=1e-4)


def test_efficientnet_trains_all_but_norms() -> None:
    backbone = EfficientNet("efficientnet_b0", "frozen_batch")
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    frozen = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(frozen) == 48
    assert all(not list(module.parameters()) for module in frozen)


def test_config_efficientnet_bad_setting_is_refused(tmp_path: Path) -> None:
    torch.save(trained("efficientnet_b0").state_dict(), tmp_path / "b0.pth")
    with pytest.raises(CheckpointError, match=r"b0\.pth"):
        build_backbone(BackboneConfig(name="efficientnet_b2", weights=str(tmp_path / "b0.pth")))
    with pytest.raises(ConfigError, match="norm=frozen_batch"):
        build_backbone(BackboneConfig(name="efficientnet_b0", norm="group"))
