"""Multi-scale deformable attention sampling with arithmetic and one table look-up for each corner of a cell.

Exported models use it (`impl="gather"`), because every runtime has these operators with the same meaning. ONNX's
GridSample differs: TensorRT has returned wrong values for it, half precision loses its coordinates, and small runtimes
lack it. Sizes may be symbolic, so that an exported graph accepts images of any size. It is several times slower than
the kernels and not for training. Callers check the inputs.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def gather_samples(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same sum as `sampling.reference`; arguments as of `ms_deform_attn`, weights of the locations' type."""
    batch, pixels, heads, channels = value.shape
    device, real = value.device, sampling_locations.dtype
    # One row for each pixel of each image and head, and a row of zeros for all pixels off the maps.
    table = torch.cat([value.to(real).flatten(0, 2), value.new_zeros(1, channels, dtype=real)])
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1) * pixels
    head = torch.arange(heads, device=device).view(-1, 1, 1)
    sizes = [height * width for height, width in spatial_shapes]
    first = torch.tensor([0, *itertools.accumulate(sizes[:-1])], device=device).view(-1, 1)
    height, width = torch.tensor(spatial_shapes, device=device)[..., None].unbind(1)  # each [L, 1]
    x = sampling_locations[..., 0] * width - 0.5  # [N, Q, M, L, P], as everything below
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
