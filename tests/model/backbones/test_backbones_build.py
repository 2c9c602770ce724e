"""Backbones: shapes and strides, the small one, and settings that do not fit together."""

from typing import Any

import pytest
import torch

from pipeline.config import BackboneConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.backbones.build import Conv5, build_backbone


def section(**values: Any) -> BackboneConfig:
    return BackboneConfig(**{"weights": "none", **values})


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        (section(name="resnet50"), (512, 1024, 2048)),
        (section(name="resnet50", dilation=True), (512, 1024, 2048)),
        (section(name="conv5", norm="group", width=8), (32, 64, 64)),
        (section(name="conv5", norm="frozen_batch", width=12), (48, 96, 96)),
    ],
)
def test_backbone_maps_have_declared_channels_and_strides(config: BackboneConfig, channels: tuple[int, ...]) -> None:
    backbone = build_backbone(config).eval()
    assert backbone.channels == channels
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 65, 96))
    sizes = [(-(-65 // s), -(-96 // s)) for s in backbone.strides]
    assert [tuple(m.shape[1:]) for m in maps] == [(c, *size) for c, size in zip(channels, sizes, strict=True)]


def test_conv5_image_does_not_depend_on_batch() -> None:
    backbone = Conv5(8, "group")
    images = torch.randn(2, 3, 64, 64)
    alone, together = backbone(images[:1]), backbone(images)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b[:1], rtol=1e-4, atol=1e-5)


def test_build_backbone_without_load_reads_no_weights() -> None:
    build_backbone(section(name="resnet50", weights="/absent.pth"), load=False)
    with pytest.raises(CheckpointError, match=r"/absent\.pth"):
        build_backbone(section(name="resnet50", weights="/absent.pth"))


def test_config_backbone_bad_combination_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"conv5.*weights=none"):
        build_backbone(section(name="conv5", weights="imagenet"))
    with pytest.raises(ConfigError, match=r"norm=frozen_batch"):
        build_backbone(section(name="resnet50", weights="imagenet", norm="group"))
