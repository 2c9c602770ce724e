"""Multi-scale deformable attention sampling: the Python functions of the project's C++/CUDA operators.

The model calls `ms_deform_attn_fused`. `ms_deform_attn` is the same with locations and weights computed by the caller,
as in other code bases. The kernels are in a library that is loaded, and built if needed, at the first call on a device.
Unsupported tensors and an unavailable implementation raise OpError; `auto` falls back to `torch` with a warning.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from pipeline.csrc import build
from pipeline.csrc.recipe import DEVICES
from pipeline.errors import OpError
from pipeline.logs import get_logger
from pipeline.model.ops.gather import gather_samples
from pipeline.model.ops.schema import has_kernel

IMPLEMENTATIONS = ("auto", "cuda", "cpu", "torch")
META = "meta"
EXPORTED = "gather"  # for exports only; not a value of model.op
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
        value: [N, S, M, D] projected pixels, concatenated levels, each row by row; fp64, fp32, bf16 or fp16.
        spatial_shapes: (H, W) of each of the L levels, on the host; the products sum to S.
        sampling_locations: [N, Q, M, L, P, 2] as (x, y), [0, 1] over the padded map; fp64 if value is, else fp32.
            A point at pixel p = x * W - 0.5 counts only if -1 < p < W (same for rows). Pixels off the map are 0. A NaN
            or infinite location gives 0, and its gradient is 0.
        attention_weights: [N, Q, M, L, P], after the softmax; any floating type.
        impl: `auto`, `cuda`, `cpu` or `torch` (grid_sample, the reference).

    Returns:
        [N, Q, M * D] of value's type; accumulated in fp32 (fp64 for fp64).

    Raises:
        OpError: shapes, types or devices do not fit, or `impl` is not available.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights, ("sampling_locations", "attention_weights"))
    _check_coordinates(value, sampling_locations, "sampling_locations")
    weights = attention_weights.to(sampling_locations.dtype)
    chosen = choose(impl, value.device.type)
    if chosen == EXPORTED:
        return gather_samples(value, spatial_shapes, sampling_locations, weights)
    if chosen != "torch":
        flat = [size for shape in spatial_shapes for size in shape]
        output: Tensor = torch.ops.deformable_detr.ms_deform_attn(value, sampling_locations, weights, flat)
        return output
    return reference(value, spatial_shapes, sampling_locations, weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    impl: str = "auto",
) -> Tensor:
    """`ms_deform_attn` including the softmax and the locations, so that neither is written to memory or kept.

    Offsets are small numbers, for which bf16 is precise enough. Absolute coordinates exist only in fp32, in the kernel.

    Args:
        value: [N, S, M, D] as in `ms_deform_attn`.
        spatial_shapes: (H, W) of each of the L levels, on the host.
        reference_points: [N, Q, L, 2] points, or [N, Q, L, 4] boxes_cxcywh, relative to each padded level; fp64 if
            value is, else fp32.
        offsets: [N, Q, M, L, P, 2] (x, y), in pixels of the level around a point, in half sides over P around a box. A
            NaN or infinite location gives 0, and its gradient is 0.
        logits: [N, Q, M, L, P]; the softmax is over levels and points together. Any floating type.
        impl: `auto`, `cuda`, `cpu` or `torch` (composed, with grid_sample).

    Returns:
        [N, Q, M * D] of value's type; accumulated in fp32 (fp64 for fp64).

    Raises:
        OpError: shapes, types or devices do not fit, or `impl` is not available.
    """
    _check(value, spatial_shapes, offsets, logits, ("offsets", "logits"))
    _check_references(value, reference_points, offsets)
    chosen = choose(impl, value.device.type)
    if chosen in DEVICES and has_fused_kernel(chosen):
        if not offsets.dtype == logits.dtype == value.dtype:
            offsets, logits = offsets.to(reference_points.dtype), logits.to(reference_points.dtype)
        flat = [size for shape in spatial_shapes for size in shape]
        output: Tensor = torch.ops.deformable_detr.ms_deform_attn_fused(value, reference_points, offsets, logits, flat)
        return output
    locations = locate(reference_points, offsets, spatial_shapes)
    weights = logits.to(reference_points.dtype).flatten(-2).softmax(-1).view(logits.shape)
    return ms_deform_attn(value, spatial_shapes, locations, weights, impl)


def locate(reference_points: Tensor, offsets: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Sampling locations [N, Q, M, L, P, 2] in the references' type; arguments as of `ms_deform_attn_fused`."""
    references = reference_points[:, :, None, :, None]
    offsets = offsets.to(references.dtype)
    if references.shape[-1] == 2:
        height_width = torch.tensor(spatial_shapes, dtype=references.dtype).to(references.device, non_blocking=True)
        return references + offsets / height_width.flip(-1)[:, None]
    # an offset of 1 is 1 / points of the distance from the centre to the side
    return references[..., :2] + offsets / offsets.shape[-2] * references[..., 2:] * 0.5


# The kernel is selected while tracing, not in the traced program: it depends only on these two strings.
@torch.compiler.assume_constant_result
def choose(impl: str, device: str) -> str:
    """Resolve `impl` for tensors on a device of type `device`: cuda, cpu, torch, or meta.

    Tensors of the meta device have no data; the operator only computes its output's shape, without a kernel.

    Raises:
        OpError: `impl` is unknown, is for another device, or cannot be built.
    """
    return _choose(impl, device)


@torch.compiler.assume_constant_result
def has_fused_kernel(implementation: str) -> bool:
    """Whether the loaded library of `cuda` or `cpu` has kernels for the fused form; else it is composed."""
    return implementation == META or has_kernel("ms_deform_attn_fused", implementation)


@functools.cache
def _choose(impl: str, device: str) -> str:
    if impl not in (*IMPLEMENTATIONS, EXPORTED):
        raise OpError(f"there is no implementation '{impl}' of ms_deform_attn; model.op is one of {IMPLEMENTATIONS}")
    if impl in ("torch", EXPORTED):
        return impl
    if device == META:
        return META
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
    # grid_sample converts a coordinate to an integer, which is undefined for NaN and huge values
    grid = torch.where(grid.abs() < _FAR, grid, _FAR)
    output = grid.new_zeros(batch * heads, channels, queries)
    levels = value.to(grid.dtype).split([h * w for h, w in spatial_shapes], dim=1)
    for level, ((height, width), pixels) in enumerate(zip(spatial_shapes, levels, strict=True)):
        maps = pixels.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        where = grid[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        weight = attention_weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        output = output + (grid_sample(maps, where, align_corners=False) * weight).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype).contiguous()


def _check(
    value: Tensor, shapes: Sequence[tuple[int, int]], points: Tensor, weights: Tensor, names: tuple[str, str]
) -> None:
    """Raise OpError unless the four inputs fit together; `names` are those of the last two."""
    if value.dim() != 4 or points.dim() != 6 or weights.dim() != 5:
        raise OpError(
            f"ms_deform_attn needs value [N, S, M, D], {names[0]} [N, Q, M, L, P, 2], {names[1]} "
            f"[N, Q, M, L, P]; got {list(value.shape)}, {list(points.shape)}, {list(weights.shape)}"
        )
    batch, pixels, heads, _ = value.shape
    if points.shape[:5] != weights.shape or points.shape[5] != 2:
        raise OpError(
            f"{names[0]} {list(points.shape)} must be {names[1]} {list(weights.shape)} with a last axis of 2 (x, y) "
            "added"
        )
    if points.shape[0] != batch or points.shape[2] != heads or points.shape[3] != len(shapes):
        raise OpError(
            f"{names[0]} {list(points.shape)} must start [{batch}, Q, {heads}, {len(shapes)}]: images and "
            "heads of value, levels of spatial_shapes"
        )
    if not shapes or any(h < 1 or w < 1 for h, w in shapes) or sum(h * w for h, w in shapes) != pixels:
        raise OpError(f"spatial_shapes {list(shapes)} must be sizes (H, W) >= 1 whose products sum to S = {pixels}")
    if not value.device == points.device == weights.device:
        raise OpError(
            f"value is on {value.device}, {names[0]} on {points.device}, {names[1]} on {weights.device}; move them to "
            "one device"
        )
    if any(tensor.dtype not in _DTYPES for tensor in (value, points, weights)):
        raise OpError(
            f"value ({value.dtype}), {names[0]} ({points.dtype}) and {names[1]} ({weights.dtype}) must be fp64, fp32, "
            "bf16 or fp16"
        )


def _check_coordinates(value: Tensor, coordinates: Tensor, name: str) -> None:
    """Raise OpError unless absolute coordinates are of the accumulation type."""
    wanted = torch.float64 if value.dtype == torch.float64 else torch.float32
    if coordinates.dtype != wanted:
        raise OpError(
            f"{name} must be {wanted} for a {value.dtype} value, not {coordinates.dtype}: half precision "
            "misplaces points by up to a third of a pixel; add reference points and offsets in float32"
        )


def _check_references(value: Tensor, references: Tensor, offsets: Tensor) -> None:
    """Raise OpError unless the reference points fit value and offsets."""
    batch, queries, levels = offsets.shape[0], offsets.shape[1], offsets.shape[3]
    if references.dim() != 4 or references.shape[:3] != (batch, queries, levels) or references.shape[3] not in (2, 4):
        raise OpError(
            f"reference_points {list(references.shape)} must be [{batch}, {queries}, {levels}, 2] or [..., 4]: images, "
            "queries and levels of offsets, (x, y) or boxes (x, y, w, h)"
        )
    if references.device != value.device:
        raise OpError(f"value is on {value.device}, reference_points on {references.device}; move them to one device")
    _check_coordinates(value, references, "reference_points")
