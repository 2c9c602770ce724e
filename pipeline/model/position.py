"""Positions of the tokens: sine embeddings and the geometry of the flattened feature levels.

Everything is float32 and computed from the padding masks on their device, without a synchronisation: sizes are host
integers. `Pyramid.of` needs masks whose first pixel is valid, which right/bottom padding guarantees.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_TEMPERATURE = 10_000.0


def sine(coordinates: Tensor, features: int) -> Tensor:
    """Interleaved sines and cosines of coordinates in radians: [...] -> [..., features]."""
    # A compiler and an exporter compute constants themselves, and their tensors must not be kept.
    constant = _wave_lengths.__wrapped__ if torch.compiler.is_compiling() else _wave_lengths
    angle = coordinates[..., None] / constant(features, coordinates.device)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


@functools.lru_cache(maxsize=8)
def _wave_lengths(features: int, device: torch.device) -> Tensor:
    """The divisor of each feature, [features]; it is constant, so it is computed once."""
    with torch.inference_mode(False):
        index = torch.arange(features, device=device, dtype=torch.float32)
        lengths: Tensor = _TEMPERATURE ** (2 * index.div(2, rounding_mode="floor") / features)
    return lengths


def shrink(mask: Tensor, feature: Tensor) -> Tensor:
    """The padding mask bool [N, H, W] at the size of a feature [N, C, h, w], by nearest pixel as published."""
    size = feature.shape[-2:]
    if torch.compiler.is_compiling():  # not every runtime of an exported graph can view a type as another
        return interpolate(mask[None].float(), size=size)[0].bool()
    return interpolate(mask[None].view(torch.uint8), size=size)[0].view(torch.bool)


def shrink_ceil(mask: Tensor, feature: Tensor, stride: int) -> Tensor:
    """The padding mask bool [N, H, W] at the size of a feature [N, C, h, w]; images keep ceil(size / stride) pixels."""
    heights, widths = (~mask[:, :, 0]).sum(1), (~mask[:, 0]).sum(1)
    below = torch.arange(feature.shape[2], device=mask.device) * stride >= heights[:, None]
    right = torch.arange(feature.shape[3], device=mask.device) * stride >= widths[:, None]
    return below[:, :, None] | right[:, None]


def sine_position(valid: Sequence[Tensor], features: int, offset: float = -0.5) -> Tensor:
    """Sine embedding of every pixel of all levels, relative to the un-padded image: y features first, then x.

    Args:
        valid: of each level [N, H, W] float32, 1 for image and 0 for padding.
        features: width of the embedding, half of it per axis.
        offset: added to the pixels' numbers, which start at 1: -0.5 gives centres; DETR uses 0.

    Returns:
        [N, S, features] for the S pixels of all levels.
    """
    numbers, counts = [], []
    for pixels in valid:
        y, x = pixels.cumsum(1), pixels.cumsum(2)
        numbers.append(torch.stack([y, x], dim=-1).flatten(1, 2))
        ends = [y[:, -1:, :].expand_as(y), x[:, :, -1:].expand_as(x)]
        counts.append(torch.stack(ends, dim=-1).flatten(1, 2))
    # all levels at once, because each operation is a launch on a GPU
    relative = (torch.cat(numbers, dim=1) + offset) / (torch.cat(counts, dim=1) + 1e-6)
    return sine(relative * (2 * math.pi), features // 2).flatten(-2)


def box_position(boxes: Tensor, features: int) -> Tensor:
    """Sine embedding of boxes in [0, 1]: [..., 4] -> [..., 4 * features] (two-stage, appendix A.4)."""
    return sine(boxes * 2 * math.pi, features).flatten(-2)


@dataclass(frozen=True)
class Pyramid:
    """Geometry of L feature levels flattened into S tokens, for a batch of N padded images."""

    shapes: tuple[tuple[int, int], ...]  # (H, W) of each level, on the host
    padding: Tensor  # bool [N, S], True = padding
    valid_ratios: Tensor  # [N, L, 2] (x, y): fraction of the padded width and height that is image
    extents: Tensor  # [L, 2] (W, H)
    valid: tuple[Tensor, ...]  # of each level, float32 [N, H, W]: 1 for image, 0 for padding

    @staticmethod
    def of(masks: Sequence[Tensor]) -> "Pyramid":
        """Make a pyramid from the padding mask [N, H, W] of each level."""
        shapes = tuple((mask.shape[1], mask.shape[2]) for mask in masks)
        valid = tuple((~mask).float() for mask in masks)
        ratios = [ratio for v in valid for ratio in (v[:, 0].mean(1), v[:, :, 0].mean(1))]
        extents = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float32)
        return Pyramid(
            shapes=shapes,
            padding=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            valid_ratios=torch.stack(ratios, dim=-1).unflatten(-1, (len(masks), 2)),
            extents=extents.to(masks[0].device, non_blocking=True),  # a plain copy would wait for the stream
            valid=valid,
        )

    @property
    def tokens(self) -> int:
        """S, the number of tokens of an image."""
        return sum(height * width for height, width in self.shapes)

    def levels(self) -> list["Pyramid"]:
        """Each level as a pyramid of its own."""
        padding = self.padding.split([height * width for height, width in self.shapes], dim=1)
        return [
            Pyramid(
                (shape,),
                padding[level],
                self.valid_ratios[:, level, None],
                self.extents[level, None],
                (self.valid[level],),
            )
            for level, shape in enumerate(self.shapes)
        ]

    def centres(self) -> Tensor:
        """Pixel centres (x, y) relative to the un-padded image, [N, S, 2]; beyond 1 in the padding."""
        constant = _pixel_centres.__wrapped__ if torch.compiler.is_compiling() else _pixel_centres
        sizes = (self.valid_ratios * self.extents).unbind(1)
        counts = [height * width for height, width in self.shapes]
        each = [size[:, None].expand(-1, count, -1) for size, count in zip(sizes, counts, strict=True)]
        return constant(self.shapes, self.valid_ratios.device) / torch.cat(each, dim=1)

    def on_levels(self, reference: Tensor) -> Tensor:
        """References relative to the un-padded image [N, Q, 2 or 4] -> relative to each padded level [N, Q, L, ...]."""
        return reference[:, :, None] * self.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)[:, None]

    def proposals(self) -> tuple[Tensor, Tensor]:
        """A box around every pixel, its side 0.05 * 2^level (two-stage, appendix A.4).

        Returns:
            Logits of boxes_cxcywh [N, S, 4], infinite where unusable; and unusable, bool [N, S, 1]: padding, or a
            side of the box not within (0.01, 0.99).
        """
        centres = self.centres()
        sides = [torch.full((h * w, 2), 0.05 * 2.0**level) for level, (h, w) in enumerate(self.shapes)]
        side = torch.cat(sides).to(centres.device, non_blocking=True)
        boxes = torch.cat([centres, side.expand_as(centres)], dim=-1)
        unusable = ~((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True) | self.padding[..., None]
        return torch.logit(boxes).masked_fill(unusable, math.inf), unusable


@functools.lru_cache(maxsize=128)  # of 0.2 MB at most; an epoch has about as many rounded sizes (`data.pad_multiple`)
def _pixel_centres(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Centres (x, y) of the pixels of levels of these (H, W), in pixels of each level, [S, 2]."""
    levels = []
    with torch.inference_mode(False):
        for height, width in shapes:
            x = torch.arange(width, device=device) + 0.5
            y = torch.arange(height, device=device) + 0.5
            levels.append(
                torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)
            )
        return torch.cat(levels)
