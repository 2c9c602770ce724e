"""Multi-scale deformable attention sampling: the Python face of the project's C++/CUDA operator.

`pipeline.model.attention` calls `ms_deform_attn`; nothing else does. The schema, the shapes that compilers and
exporters ask for, and the derivative are registered here, when this module is imported; the kernels come from a library
that is loaded (and built, if need be) at the first call on a device. It fails with OpError for tensors it cannot take,
and where the implementation that was asked for cannot be had; `auto` then falls back to `torch`, with a warning.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from pipeline.csrc import build
from pipeline.csrc.recipe import DEVICES
from pipeline.errors import OpError
from pipeline.runtime import get_logger

IMPLEMENTATIONS = ("auto", "cuda", "cpu", "torch")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FAR = 3.0  # a grid coordinate that is outside any map: pixel (3 + 1) * W / 2 - 0.5 > W for every W >= 1


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    impl: str = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples of all levels, per query and head (arXiv 2010.04159, equation 3, inner sum).

    Args:
        value: [N, S, M, D] projected pixels, levels one after the other, each row by row; fp64, fp32, bf16 or fp16.
        spatial_shapes: (H, W) of each of the L levels, on the host; the products sum to S.
        sampling_locations: [N, Q, M, L, P, 2] as (x, y), [0, 1] over the padded map; fp64 if value is, else fp32.
            A point at pixel p = x * W - 0.5 counts only if -1 < p < W (rows likewise); pixels off the map are 0, and
            so is a NaN or infinite location, gradient included.
        attention_weights: [N, Q, M, L, P], after the softmax; any floating type.
        impl: `auto`, `cuda`, `cpu` or `torch` (grid_sample, the reference).

    Returns:
        [N, Q, M * D] of value's type; accumulated in fp32 (fp64 for fp64).

    Raises:
        OpError: shapes, types or devices do not fit, or `impl` cannot be had here.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    weights = attention_weights.to(sampling_locations.dtype)
    if choose(impl, value.device.type) != "torch":
        flat = [size for shape in spatial_shapes for size in shape]
        output: Tensor = torch.ops.deformable_detr.ms_deform_attn(value, sampling_locations, weights, flat)
        return output
    return reference(value, spatial_shapes, sampling_locations, weights)


# Which kernel runs is decided while tracing, not in the traced program: it depends on nothing but these two words.
@torch.compiler.assume_constant_result
def choose(impl: str, device: str) -> str:
    """The implementation that `impl` means for tensors on a device of type `device`: cuda, cpu or torch.

    Raises:
        OpError: `impl` is unknown, made for another device, or cannot be built.
    """
    return _choose(impl, device)


@functools.cache
def _choose(impl: str, device: str) -> str:
    if impl not in IMPLEMENTATIONS:
        raise OpError(f"there is no implementation '{impl}' of ms_deform_attn; model.op is one of {IMPLEMENTATIONS}")
    if impl == "torch":
        return impl
    if impl == "auto":
        log = get_logger("model.ops")
        if device not in DEVICES:
            log.info("ms_deform_attn on %s: torch (there is no kernel for this device)", device)
            return "torch"
        try:
            library = build.load(device)
        except OpError as error:
            log.warning("ms_deform_attn on %s: torch (grid_sample, several times slower), because %s", device, error)
            return "torch"
        log.info("ms_deform_attn on %s: %s (%s)", device, device, library)
        return device
    if impl != device:
        raise OpError(f"implementation '{impl}' got tensors on {device}; set model.op=auto or move the tensors")
    build.load(device)
    return impl


def reference(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same sum by `torch.nn.functional.grid_sample`, differentiable any number of times; arguments as above."""
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    grid = 2 * sampling_locations - 1
    # grid_sample converts a coordinate to an integer, which is undefined for NaN and huge ones
    grid = torch.where(grid.abs() < _FAR, grid, _FAR)
    output = grid.new_zeros(batch * heads, channels, queries)
    levels = value.to(grid.dtype).split([h * w for h, w in spatial_shapes], dim=1)
    for level, ((height, width), pixels) in enumerate(zip(spatial_shapes, levels, strict=True)):
        maps = pixels.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        where = grid[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        weight = attention_weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        output = output + (grid_sample(maps, where, align_corners=False) * weight).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype).contiguous()


def _check(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    """Raise OpError unless the four inputs fit together."""
    if value.dim() != 4 or locations.dim() != 6 or weights.dim() != 5:
        raise OpError(
            "ms_deform_attn needs value [N, S, M, D], sampling_locations [N, Q, M, L, P, 2], attention_weights "
            f"[N, Q, M, L, P]; got {list(value.shape)}, {list(locations.shape)}, {list(weights.shape)}"
        )
    batch, pixels, heads, _ = value.shape
    if locations.shape[:5] != weights.shape or locations.shape[5] != 2:
        raise OpError(
            f"sampling_locations {list(locations.shape)} must be attention_weights {list(weights.shape)} with a last "
            "axis of 2 (x, y) added"
        )
    if locations.shape[0] != batch or locations.shape[2] != heads or locations.shape[3] != len(shapes):
        raise OpError(
            f"sampling_locations {list(locations.shape)} must start [{batch}, Q, {heads}, {len(shapes)}]: images and "
            "heads of value, levels of spatial_shapes"
        )
    if not shapes or any(h < 1 or w < 1 for h, w in shapes) or sum(h * w for h, w in shapes) != pixels:
        raise OpError(f"spatial_shapes {list(shapes)} must be sizes (H, W) >= 1 whose products sum to S = {pixels}")
    if not value.device == locations.device == weights.device:
        raise OpError(
            f"value is on {value.device}, sampling_locations on {locations.device}, attention_weights on "
            f"{weights.device}; move them to one device"
        )
    if value.dtype not in _DTYPES or weights.dtype not in _DTYPES:
        raise OpError(f"value ({value.dtype}) and attention_weights ({weights.dtype}) must be fp64, fp32, bf16 or fp16")
    wanted = torch.float64 if value.dtype == torch.float64 else torch.float32
    if locations.dtype != wanted:
        raise OpError(
            f"sampling_locations must be {wanted} for a {value.dtype} value, not {locations.dtype}: half precision "
            "misplaces points by up to a third of a pixel; add reference points and offsets in float32"
        )


# The operator as torch knows it. The libraries only add kernels to these names, so they may come later, or never.
# Locations and weights are of the accumulation type: fp64 for fp64, else fp32. `spatial_shapes` is H0, W0, H1, W1, ...
# on the host: no synchronisation, and the sizes reach a CUDA kernel as arguments. The backward returns an empty tensor
# for each gradient that is not `wanted` (of value, locations, weights).
_LIBRARY = torch.library.Library("deformable_detr", "DEF")
_LIBRARY.define(
    "ms_deform_attn(Tensor value, Tensor sampling_locations, Tensor attention_weights, SymInt[] spatial_shapes)"
    " -> Tensor"
)
_LIBRARY.define(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor sampling_locations, Tensor attention_weights, "
    "SymInt[] spatial_shapes, bool[] wanted) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("deformable_detr::ms_deform_attn", lib=_LIBRARY)
def _forward_shape(value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int]) -> Tensor:
    return value.new_empty(locations.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake("deformable_detr::ms_deform_attn_backward", lib=_LIBRARY)
def _backward_shape(
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    inputs = (value, locations, weights)
    return tuple(t.new_empty(t.shape if want else (0,)) for t, want in zip(inputs, wanted, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.shapes = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    if grad_output.is_cuda:  # it adds into grad_value in the order in which threads arrive
        torch._prims_common.alert_not_deterministic("ms_deform_attn_backward on CUDA")
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.deformable_detr.ms_deform_attn_backward(grad_output, *ctx.saved_tensors, ctx.shapes, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise OpError("ms_deform_attn has no second derivative; use impl='torch' (model.op=torch) for one")


torch.library.register_autograd("deformable_detr::ms_deform_attn", _backward, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("deformable_detr::ms_deform_attn_backward", _no_second_derivative, lib=_LIBRARY)
