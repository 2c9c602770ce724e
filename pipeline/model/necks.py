"""Necks: FPN and BiFPN mix the levels of a pyramid and keep their number, sizes and width.

`deformable.DeformableDETR` has one after its input projections (Table 2 of arXiv 2010.04159); EfficientDet uses BiFPN.
A neck needs at least two levels; the config section refuses fewer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, interpolate, max_pool2d, silu
from torchvision.ops import FeaturePyramidNetwork

from pipeline.config import ModelConfig
from pipeline.model.backbones.norms import group_norm

_EPS = 1e-4  # in the divisor of the fusion weights, as published


class FPN(nn.Module):
    """Feature pyramid network (arXiv 1612.03144): each level adds the coarser ones, then a 3x3 convolution."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork([width] * levels, width)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [N, width, H, W] of each level, finest first -> as many of the same sizes."""
        return list(self.pyramid({str(level): x for level, x in enumerate(maps)}).values())


class BiFPN(nn.Module):
    """Bidirectional FPN (arXiv 1911.09070, section 3), repeated `repeats` times.

    It has group norm instead of batch norm: with the few images of a detection batch, batch statistics would be noise
    and would make the result depend on the world size.
    """

    def __init__(self, width: int, levels: int, repeats: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BiFPNLayer(width, levels) for _ in range(repeats))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [N, width, H, W] of each level, finest first, of any sizes -> as many of the same sizes."""
        for layer in self.layers:
            maps = layer(maps)
        return list(maps)


class BiFPNLayer(nn.Module):
    """Once down from the coarsest level to the finest and once back up."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(Fusion(width, 2) for _ in range(levels - 2))  # the levels between first and last
        self.up = nn.ModuleList(Fusion(width, 3 if 0 < level < levels - 1 else 2) for level in range(levels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """As of BiFPN."""
        last = len(maps) - 1
        down = list(maps)
        for level in range(last - 1, 0, -1):
            down[level] = self.down[level - 1](maps[level], resize(down[level + 1], maps[level]))
        up = [self.up[0](maps[0], resize(down[1], maps[0]))]
        for level in range(1, last + 1):
            own = [maps[level], down[level]] if level < last else [maps[level]]  # the last level has no top-down node
            up.append(self.up[level](*own, resize(up[-1], maps[level])))
        return up


class Fusion(nn.Module):
    """One node: maps of equal size are mixed with learned weights; then swish and a separable 3x3 convolution."""

    def __init__(self, width: int, inputs: int) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.ones(inputs))
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm = group_norm(width)

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps [N, width, H, W] -> one of the same shape."""
        shares = self.shares.relu()
        shares = shares / (shares.sum() + _EPS)  # "fast normalised fusion": non-negative weights without a softmax
        mixed = shares[0] * maps[0]
        for share, x in zip(shares[1:], maps[1:], strict=True):
            mixed = mixed + share * x
        fused: Tensor = self.norm(self.pointwise(self.depthwise(silu(mixed))))
        return fused


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Resize a map to another level's size: nearest pixel to enlarge, maximum to shrink.

    Halving is a 3x3 max pooling of stride 2, as published; 25 pixels become 13. Other ratios pool adaptively.
    """
    (height, width), size = x.shape[-2:], like.shape[-2:]
    if size == (height, width):
        return x
    if size == ((height + 1) // 2, (width + 1) // 2):
        return max_pool2d(x, kernel_size=3, stride=2, padding=1)
    if size[0] >= height and size[1] >= width:
        return interpolate(x, size=size)
    return adaptive_max_pool2d(x, (size[0], size[1]))


def build_neck(config: ModelConfig) -> FPN | BiFPN | None:
    """Build the neck of the `model` section for its `levels` of width `hidden_dim`; None without a neck."""
    if config.neck == "none":
        return None
    if config.neck == "fpn":
        return FPN(config.hidden_dim, config.levels)
    return BiFPN(config.hidden_dim, config.levels, config.neck_layers)
