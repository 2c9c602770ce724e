"""Multi-scale deformable attention sampling out of arithmetic and a table look-up for each corner of a cell.

What a model is exported with (`impl="gather"`, chosen by `pipeline.inference.export` only): every runtime has these
operators, and they mean the same in all of them. ONNX's GridSample does not: TensorRT has returned wrong
values for it, its coordinates are lost in half precision, and small runtimes lack it. Sizes may be the symbols of a
tracer, so that an exported graph takes images of any size. Several times slower than the kernels; not for training.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def gather_samples(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same sum as `ops.reference`; arguments as of `ops.ms_deform_attn`, weights of the locations' type."""
    batch, pixels, heads, channels = value.shape
    device, real = value.device, sampling_locations.dtype
    # a row for each pixel of each image and head, and one of zeros that stands for all pixels off the maps
    table = torch.cat([value.to(real).flatten(0, 2), value.new_zeros(1, channels, dtype=real)])
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1) * pixels
    head = torch.arange(heads, device=device).view(-1, 1, 1)
    sizes = [height * width for height, width in spatial_shapes]
    first = torch.tensor([0, *itertools.accumulate(sizes[:-1])], device=device).view(-1, 1)
    height, width = torch.tensor(spatial_shapes, device=device)[..., None].unbind(1)  # each [L, 1]
    x = sampling_locations[..., 0] * width - 0.5  # [N, Q, M, L, P], like all below
    y = sampling_locations[..., 1] * height - 0.5
    on_map = (x > -1) & (x < width) & (y > -1) & (y < height)  # false for NaN
    x, y = torch.where(on_map, x, 0.0), torch.where(on_map, y, 0.0)
    left, top = x.floor(), y.floor()
    output = sampling_locations.new_zeros(())
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        near = (1 - (x - column).abs()) * (1 - (y - row).abs())
        inside = on_map & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        pixel = image + first + row.long() * width + column.long()
        index = torch.where(inside, pixel * heads + head, batch * pixels * heads).flatten(3)
        rows = table.index_select(0, index.flatten()).view(*index.shape, channels)
        output = output + (near * attention_weights).flatten(3)[..., None, :] @ rows
    return output.flatten(2).to(value.dtype)
