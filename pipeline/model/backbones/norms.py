"""Normalisation that no other image of the batch and no other rank can change. Used by backbones and necks.

Statistics over a batch would tie the result to the pad groups' size and the world size, so there are two kinds: batch
norm that is frozen, for weights that were trained with it, and group norm for layers that train from nothing.

With `model.norm_valid` they take the valid pixels of their map, too: their output is zero in the padding, and group
norm counts valid pixels only. So an image has the same map alone and in any batch.
"""

from collections.abc import Callable
from math import gcd
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

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

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[N, C, H, W] and `valid_pixels`, if they count -> the same shape and type."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        out = torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])
        return out if valid is None else out * valid.to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, or given the valid pixels their norm, with zeros elsewhere."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[N, C, H, W] of any content in the padding, and `valid_pixels`, if they count -> the same shape and type."""
        if valid is None:  # not nn.GroupNorm's own forward, which in training refuses a group of a single number
            return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        arguments = (x, valid, self.weight, self.bias, self.num_groups, self.eps)
        if torch.compiler.is_compiling():  # compilers and exporters shall see arithmetic that they can fuse
            return _normalise(*arguments)[0]
        out: Tensor = _ValidGroupNorm.apply(*arguments)
        return out


class _ValidGroupNorm(torch.autograd.Function):
    """`_normalise` with a backward that makes one copy of the map, where autograd's would make several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        out, *saved = _normalise(x, valid, weight, bias, groups, eps)
        ctx.save_for_backward(weight, *saved)
        ctx.dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, centred, inside, rstd, count = ctx.saved_tensors
        grad_out = grad.to(centred.dtype).reshape(centred.shape) * inside
        of_bias, of_map = grad_out.sum(3, keepdim=True), (grad_out * centred).sum(3, keepdim=True)
        weights = weight.view(*centred.shape[1:3], 1)
        offset, slope = ((s * weights).sum(2, keepdim=True) / count for s in (of_bias * rstd, of_map * rstd**3))
        # one broadcast factor in each step: with two of them the CPU's kernels are not vectorised
        grad_x = torch.addcmul(-offset * inside, centred, -slope).addcmul_(grad_out, rstd * weights)
        grad_weight, grad_bias = (of_map * rstd).sum(0).flatten(), of_bias.sum(0).flatten()
        return grad_x.to(ctx.dtype).view(grad.shape), None, grad_weight, grad_bias, None, None


def _normalise(
    x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The normalised map of x [N, C, H, W], and what a backward needs, with P = H * W, in float32 or wider.

    That is [N, groups, C / groups, P] the map less the means of its groups, zero in the padding; [N, 1, 1, P] the valid
    pixels; [N, groups, 1, 1] 1 / deviation; [N, 1, 1, 1] the numbers in a group.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(wide).flatten(2).unflatten(1, (groups, -1))  # no len(x): an exporter would fix the number of images
    inside = valid.to(wide).flatten(2)[:, None]
    count = inside.sum(3, keepdim=True) * grouped.shape[2]
    centred = grouped * inside
    mean = centred.sum((2, 3), keepdim=True) / count
    centred.sub_(mean * inside)
    rstd = (centred.square().sum((2, 3), keepdim=True) / count + eps).rsqrt()
    scale = rstd * weight.view(*grouped.shape[1:3], 1)
    # not in groups: a Function's output must not be a view, which layers behind it could not change in place
    out = centred.flatten(1, 2).unflatten(2, x.shape[2:]) * scale.flatten(1, 2)[..., None]
    out.addcmul_(valid.to(wide), bias[:, None, None])
    return out.to(x.dtype), centred, inside, rstd, count


def valid_pixels(mask: Tensor) -> Tensor:
    """What is image, as 1 and 0, out of the padding mask bool [N, H, W]: float32 [N, 1, H, W]."""
    return (~mask)[:, None].float()


@overload
def subsample(valid: Tensor, stride: int = 2) -> Tensor: ...
@overload
def subsample(valid: None, stride: int = 2) -> None: ...
def subsample(valid: Tensor | None, stride: int = 2) -> Tensor | None:
    """The valid pixels [N, 1, H, W] of a map of this stride to theirs: ceil(size / stride) of each image.

    That many rows and columns a convolution or pooling of this stride makes of an image that is alone.
    """
    return None if valid is None else max_pool2d(valid, kernel_size=1, stride=stride)


def group_norm(channels: int) -> GroupNorm:
    """GroupNorm of 32 groups, or fewer where they do not divide or a group would hold less than four channels."""
    return GroupNorm(gcd(32, max(channels // 4, 1), channels), channels)


NORMS: dict[str, Norm] = {"frozen_batch": FrozenBatchNorm2d, "group": group_norm}  # by `model.backbone.norm`
