"""Multiply-adds of a detector on an image, by PyTorch's flop counter with formulas for more operators.

Importing this module registers the formulas with torch, so that any `FlopCounterMode` counts this project's operators.
As in the papers' tables, convolutions, matrix products and attention are counted; norms, activations, softmax and the
selection of boxes are not. An image that the model refuses is a ConfigError.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry, register_flop_formula

import pipeline.model.ops.schema  # noqa: F401  # defines torch.ops.deformable_detr
from pipeline.config import ModelConfig
from pipeline.model.build import build_model

Size = tuple[int, int]  # (height, width) in pixels
_OPS, _VISION = torch.ops.deformable_detr, torch.ops.torchvision

# Per point and channel: four products with the bilinear weights and one with the attention weight (arXiv 2010.04159,
# appendix A.1). Backward: four to distribute the gradient to the pixels, and four for its products with the pixels.
_SAMPLE, _SPREAD, _DOT = 5, 4, 4


@register_flop_formula([_OPS.ms_deform_attn, _OPS.ms_deform_attn_fused])
def _forward(value: Any, *rest: Any, **_: Any) -> int:
    return 2 * _SAMPLE * _points(rest) * value[3]


@register_flop_formula([_OPS.ms_deform_attn_backward, _OPS.ms_deform_attn_backward_ordered,
                        _OPS.ms_deform_attn_fused_backward, _OPS.ms_deform_attn_fused_backward_ordered])  # fmt: skip
def _backward(grad_output: Any, value: Any, *rest: Any, **_: Any) -> int:
    wanted: list[bool] = rest[-1]
    each = _SPREAD * wanted[0] + _DOT * any(wanted[1:])
    return 2 * each * _points(rest) * value[3]


def _points(rest: tuple[Any, ...]) -> int:
    """N * Q * M * L * P, from the shape of the weights or logits, the one with five axes."""
    return prod(next(shape for shape in rest if len(shape) == 5))


@register_flop_formula(_VISION.deform_conv2d)
def _deform_conv(x: Any, weight: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    """The convolution, and four products for each tap of each input channel."""
    taps = out_shape[0] * prod(out_shape[2:]) * prod(weight[2:]) * x[1]
    return conv_flop_count(x, weight, out_shape) + 2 * 4 * taps


@register_flop_formula(_VISION._deform_conv2d_backward)
def _deform_conv_backward(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Twice the convolution, as for a plain one, plus the sampling's backward for each tap."""
    taps = grad[0] * prod(grad[2:]) * prod(weight[2:]) * x[1]
    return 2 * conv_flop_count(x, weight, grad) + 2 * (_SPREAD + _DOT) * taps


def multiply_adds(config: ModelConfig, sizes: Mapping[Size, int]) -> float:
    """Multiply-adds of one image in evaluation, alone in its batch; the mean over images.

    Args:
        config: the `model` section; its weights are not read.
        sizes: of the resized images -> the number of images with that size.
    """
    images = sum(sizes.values())
    with torch.device("meta"):
        model = build_model(config, load_backbone=False).eval()
    if not model.takes_targets:
        return sum(_count(model, size) * number for size, number in sizes.items()) / images
    # The work of these detectors depends on what they find, so one image must run. One is enough: the cost is
    # proportional to the area, except for the second stage of Faster R-CNN, a fixed 8%.
    model = build_model(config, load_backbone=False).eval()
    size = max(sizes, key=lambda each: sizes[each])
    mean_area = sum(prod(each) * number for each, number in sizes.items()) / images
    with torch.no_grad(), _ShapesOnly():
        return _count(model, size) * mean_area / prod(size)


def _count(model: torch.nn.Module, size: Size) -> int:
    device = next(model.parameters()).device
    images, mask = torch.zeros(1, 3, *size, device=device), torch.zeros(1, *size, dtype=torch.bool, device=device)
    # The fused attention kernels do not have a formula on every device; the math backend is two products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, mask)
    return int(counter.get_total_flops()) // 2


class _ShapesOnly(TorchDispatchMode):
    """Operators with a formula are not computed: they return zeros of the right shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket not in flop_registry:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs or {}))
        return tree_map_only(Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"), func(*args, **kwargs))
