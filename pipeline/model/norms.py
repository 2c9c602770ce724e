"""Normalisation that no other image of the batch and no other rank can change. Used by backbones and necks.

Statistics over a batch would tie the result to the pad groups' size and the world size, so there are two kinds: batch
norm that is frozen, for weights that were trained with it, and group norm for layers that train from nothing.
"""

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with everything fixed: the four vectors are buffers, so no optimizer and no batch changes them.

    Unlike torchvision's it keeps a bfloat16 input bfloat16, and makes one pass over it.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape and type."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or fewer where they do not divide or a group would hold less than four channels."""
    return nn.GroupNorm(gcd(32, max(channels // 4, 1), channels), channels)


NORMS: dict[str, Norm] = {"frozen_batch": FrozenBatchNorm2d, "group": group_norm}  # by `model.backbone.norm`
