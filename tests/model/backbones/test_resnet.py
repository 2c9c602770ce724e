"""ResNets and ResNeXts: torchvision's arithmetic and keys, freezing, dilation, deformable stages."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from pipeline.config import BackboneConfig
from pipeline.model.backbones.deform_conv import ModulatedDeformConv2d
from pipeline.model.backbones.norms import FrozenBatchNorm2d
from pipeline.model.backbones.resnet import ResNet

NAMES = ("resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d")


def resnet(name: str = "resnet50", **values: Any) -> ResNet:
    return ResNet(BackboneConfig(name=name, weights="none", **values))


def plain_maps(name: str, images: Tensor, dilation: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A state_dict of torchvision's network with random batch norm, and its maps of layer2 to layer4."""
    network = torchvision.models.get_model(name, replace_stride_with_dilation=[False, False, dilation]).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    maps: list[Tensor] = []
    for stage in (network.layer2, network.layer3, network.layer4):
        stage.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    network(images)
    state = network.state_dict()
    return {k: v for k, v in state.items() if not k.startswith("fc.") and "num_batches" not in k}, maps


@pytest.mark.parametrize("dilation", [False, True])
@pytest.mark.parametrize("name", ["resnet50", "resnext101_32x8d"])
@torch.no_grad()
def test_resnet_maps_equal_torchvision(name: str, dilation: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 65, 96)
    state, expected = plain_maps(name, images, dilation)
    backbone = resnet(name, dilation=dilation)
    backbone.body.load_state_dict(state)
    for actual, wanted, stride in zip(backbone(images), expected, backbone.strides, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
        assert actual.shape[2:] == (-(-65 // stride), 96 // stride)


@pytest.mark.parametrize("name", NAMES)
def test_resnet_keys_and_channels(name: str) -> None:
    with torch.device("meta"):
        backbone, network = resnet(name), torchvision.models.get_model(name)
    state = {k: v.shape for k, v in network.state_dict().items() if not k.startswith("fc.") and "num_batches" not in k}
    assert {k: v.shape for k, v in backbone.body.state_dict().items()} == state
    last = [stage[-1].conv3.out_channels for stage in (network.layer2, network.layer3, network.layer4)]
    assert list(backbone.channels) == last


def test_resnet_frozen_batch_norm_trains_layers_2_to_4() -> None:
    backbone = resnet()
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert all("conv" in name or "downsample.0" in name for name, _ in backbone.named_parameters())
    assert sum(p.numel() for p in backbone.parameters() if not p.requires_grad) == 222_400


def test_resnet_group_norm_trains_everything() -> None:
    with torch.device("meta"):
        backbone = resnet("resnet101", norm="group")
    assert len(backbone.body.layer3) == 23
    assert all(p.requires_grad for p in backbone.parameters())
    assert not any(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)) for m in backbone.modules())


@pytest.mark.parametrize("name", ["resnet50", "resnext101_64x4d"])
def test_resnet_deformable_convolutions_replace_stages_3_to_5(name: str) -> None:
    with torch.device("meta"):
        plain, backbone = resnet(name), resnet(name, deformable_conv=True)
    found = {key for key, module in backbone.named_modules() if isinstance(module, ModulatedDeformConv2d)}
    stages = ("body.layer2", "body.layer3", "body.layer4")
    threes = {key for key, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    assert found == {key for key in threes if key.startswith(stages)}
    shapes = {key: tensor.shape for key, tensor in backbone.state_dict().items() if ".conv_offset." not in key}
    assert shapes == {key: tensor.shape for key, tensor in plain.state_dict().items()}
    assert all(p.requires_grad for key, p in backbone.named_parameters() if ".conv_offset." in key)


@pytest.mark.parametrize("dilation", [False, True])
@torch.no_grad()
def test_resnet_deformable_starts_as_half_the_plain(dilation: bool) -> None:
    torch.manual_seed(0)
    plain, backbone = resnet(dilation=dilation), resnet(dilation=dilation, deformable_conv=True)
    backbone.load_state_dict(plain.state_dict(), strict=False)
    for stage in (plain.body.layer2, plain.body.layer3, plain.body.layer4):
        for block in stage:
            block.conv2.weight /= 2
    images = torch.randn(1, 3, 64, 80)
    for actual, expected in zip(backbone(images), plain(images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
