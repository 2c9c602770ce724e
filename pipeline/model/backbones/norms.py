"""Normalisation that does not depend on the other images of the batch or on other ranks.

Statistics over a batch would make the result depend on the size of pad groups and the world size. So there are two
norms: frozen batch norm for weights that were trained with it, and group norm for layers trained from scratch.

With `model.norm_valid` they also take the valid pixels of their map. The output is then zero in the padding, and group
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
    """Batch norm with fixed values: the four vectors are buffers, which no optimizer and no batch changes.

    Unlike torchvision's, it keeps the type of a bfloat16 input and makes one pass over it. In training it computes the
    factor and the summand once, and again after a buffer has changed. While `folded`, the convolution before it
    contains both (see `engine.prepared`).
    """

    folded = False

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
        self._kept: tuple[list[tuple[Tensor, int]], torch.dtype, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[N, C, H, W], and optionally `valid_pixels` -> the same shape and type."""
        if self.folded:
            return x if valid is None else x * valid.to(x.dtype)
        # A compiler fuses the arithmetic; evaluation makes tensors that training could not use (inference mode).
        keep = self.training and not torch.compiler.is_compiling()
        scale, shift = self.constants(x.dtype) if keep else self._constants(x.dtype)
        out = torch.addcmul(shift, x, scale)
        return out if valid is None else out * valid.to(x.dtype)

    def _constants(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return scale.to(dtype)[:, None, None], shift.to(dtype)[:, None, None]

    def constants(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factor and summand [C, 1, 1]: those of the last call if neither buffers nor type have changed."""
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if self._kept is not None and self._kept[1] is dtype:
            known = self._kept[0]
            if all(b is k and b._version == v for b, (k, v) in zip(buffers, known, strict=True)):
                return self._kept[2]
        constants = self._constants(dtype)
        self._kept = [(buffer, buffer._version) for buffer in buffers], dtype, constants
        return constants


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`; with valid pixels, the norm of these pixels and zeros elsewhere."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[N, C, H, W] with any values in the padding, and optionally `valid_pixels` -> the same shape and type."""
        if valid is None:  # nn.GroupNorm's own forward refuses a group of one element in training
            return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        arguments = (x, valid, self.weight, self.bias, self.num_groups, self.eps)
        if torch.compiler.is_compiling():  # compilers and exporters can fuse plain arithmetic
            return _normalise(*arguments)[0]
        out: Tensor = _ValidGroupNorm.apply(*arguments)
        return out


class _ValidGroupNorm(torch.autograd.Function):
    """`_normalise` with a backward that makes one copy of the map instead of several."""

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
        # one broadcast factor per step: with two, the CPU's kernels are not vectorised
        grad_x = torch.addcmul(-offset * inside, centred, -slope).addcmul_(grad_out, rstd * weights)
        grad_weight, grad_bias = (of_map * rstd).sum(0).flatten(), of_bias.sum(0).flatten()
        return grad_x.to(ctx.dtype).reshape(grad.shape), None, grad_weight, grad_bias, None, None


def _normalise(
    x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalise x [N, C, H, W]; also returns the backward's inputs in float32 or wider, with P = H * W.

    They are the map without its groups' means, zero in the padding, [N, groups, C / groups, P]; the valid pixels
    [N, 1, 1, P]; 1 / deviation [N, groups, 1, 1]; and the number of elements in a group [N, 1, 1, 1].
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
    # not in groups: a Function's output must not be a view, because later layers change it in place
    out = centred.flatten(1, 2).unflatten(2, x.shape[2:]) * scale.flatten(1, 2)[..., None]
    out.addcmul_(valid.to(wide), bias[:, None, None])
    return out.to(x.dtype), centred, inside, rstd, count


def valid_pixels(mask: Tensor) -> Tensor:
    """From the padding mask bool [N, H, W] to valid pixels, 1 for image and 0 for padding: float32 [N, 1, H, W]."""
    return (~mask)[:, None].float()


@overload
def subsample(valid: Tensor, stride: int = 2) -> Tensor: ...
@overload
def subsample(valid: None, stride: int = 2) -> None: ...
def subsample(valid: Tensor | None, stride: int = 2) -> Tensor | None:
    """Valid pixels [N, 1, H, W] after a layer of this stride: ceil(size / stride) rows and columns of each image.

    A convolution or pooling of this stride gives an unpadded image the same number of rows and columns.
    """
    return None if valid is None else max_pool2d(valid, kernel_size=1, stride=stride)


def group_norm(channels: int) -> GroupNorm:
    """GroupNorm of 32 groups; fewer if 32 does not divide `channels` or a group would have less than four channels."""
    return GroupNorm(gcd(32, max(channels // 4, 1), channels), channels)


NORMS: dict[str, Norm] = {"frozen_batch": FrozenBatchNorm2d, "group": group_norm}  # by `model.backbone.norm`
