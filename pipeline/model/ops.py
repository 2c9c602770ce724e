"""Multi-scale deformable attention sampling: the Python face of the project's C++/CUDA operator.

`pipeline.model.attention` calls `ms_deform_attn`; nothing else does. It fails with OpError for tensors it cannot take.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from pipeline.errors import OpError

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
        OpError: shapes, types or devices do not fit.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    weights = attention_weights.to(sampling_locations.dtype)
    return reference(value, spatial_shapes, sampling_locations, weights)


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
    return output.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)


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
    if not value.is_floating_point() or not weights.is_floating_point():
        raise OpError(f"value ({value.dtype}) and attention_weights ({weights.dtype}) must be floating-point tensors")
    wanted = torch.float64 if value.dtype == torch.float64 else torch.float32
    if locations.dtype != wanted:
        raise OpError(
            f"sampling_locations must be {wanted} for a {value.dtype} value, not {locations.dtype}: half precision "
            "misplaces points by up to a third of a pixel; add reference points and offsets in float32"
        )
