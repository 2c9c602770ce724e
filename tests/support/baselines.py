"""Small baselines and their torchvision counterparts, for the tests of the detectors outside the DETR family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pipeline.config import ModelConfig
from pipeline.model import build_model
from pipeline.model.baselines.base import Baseline
from pipeline.model.boxes import xyxy_to_cxcywh

NAMES = ("faster_rcnn", "fcos", "atss", "efficientdet")
CLASSES = 5


def small(name: str, **changes: Any) -> Baseline:
    """A baseline over Conv5, the same weights at every call."""
    backbone = {"name": "conv5", "weights": "none", "norm": "group", "width": 8}
    layers = {"faster_rcnn": {}, "efficientdet": {"neck_layers": 1, "head_layers": 1}}.get(name, {"head_layers": 1})
    tree = {"name": name, "num_classes": CLASSES, "hidden_dim": 32, "backbone": backbone, **layers, **changes}
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate(tree))
    assert isinstance(model, Baseline)
    return model


def with_resnet(name: str) -> Baseline:
    """The detector over ResNet-50 with random weights."""
    backbone = {"name": "resnet50", "weights": "none"}
    model = build_model(ModelConfig.model_validate({"name": name, "num_classes": CLASSES, "backbone": backbone}))
    assert isinstance(model, Baseline)
    return model


def torchvision_twin(make: Callable[..., nn.Module], classes: int, ours: Baseline, size: tuple[int, int]) -> nn.Module:
    """The torchvision model of the same weights and frozen batch norm, which takes images of `size` as they are."""
    torch.manual_seed(0)
    resize = {"_skip_resize": True, "min_size": size[0], "max_size": size[1]}  # the first is for training only
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    twin: nn.Module = make(weights=None, weights_backbone=None, num_classes=classes, **resize, **plain)
    _freeze(twin)
    tensors = {key.replace("backbone.fpn.", "fpn."): value for key, value in twin.state_dict().items()}
    ours.double().load_state_dict(tensors)
    return twin.double()


def _freeze(module: nn.Module) -> None:
    """Frozen batch norms of random values, small enough that no score of a random model is 1."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)
            frozen.weight.uniform_(0.3, 0.6)
            frozen.running_mean.normal_(0, 0.1)
            frozen.running_var.uniform_(0.8, 1.2)
            setattr(module, name, frozen)
        else:
            _freeze(child)


def scene(size: tuple[int, int]) -> tuple[Tensor, Tensor, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Two images of `size` without padding, and the same targets as we take them and as torchvision does; float64.

    In float32 two of a thousand proposals may change places between two ways to write the same sum.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = size
    images = torch.randn(2, 3, height, width, generator=generator).double()
    extent = torch.tensor([width, height, width, height]).double()
    ours, theirs = [], []
    for count in (6, 3):
        corner = torch.rand(count, 2, generator=generator).double() * 0.6
        boxes = torch.cat([corner, corner + 0.05 + 0.35 * torch.rand(count, 2, generator=generator)], dim=1)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        ours.append({"boxes": xyxy_to_cxcywh(boxes), "labels": labels})
        theirs.append({"boxes": boxes * extent, "labels": labels})
    return images, torch.zeros(2, height, width, dtype=torch.bool), ours, theirs
