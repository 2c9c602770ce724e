"""Positions of the tokens: sine embeddings and the geometry of the flattened feature levels.

Everything is float32 and computed from the padding masks on their device, without a synchronisation: sizes are host
integers. `Pyramid.of` needs masks whose first pixel is valid, which right/bottom padding guarantees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_TEMPERATURE = 10_000.0


def sine(coordinates: Tensor, features: int) -> Tensor:
    """Interleaved sines and cosines of coordinates in radians: [...] -> [..., features]."""
    index = torch.arange(features, device=coordinates.device, dtype=torch.float32)
    angle = coordinates[..., None] / _TEMPERATURE ** (2 * index.div(2, rounding_mode="floor") / features)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


def shrink(mask: Tensor, feature: Tensor) -> Tensor:
    """The padding mask bool [N, H, W] at the size of a feature [N, C, h, w], by nearest pixel as published."""
    return interpolate(mask[None].float(), size=feature.shape[-2:])[0].bool()


def shrink_ceil(mask: Tensor, feature: Tensor, stride: int) -> Tensor:
    """The padding mask bool [N, H, W] at the size of a feature [N, C, h, w]; images keep ceil(size / stride) pixels."""
    heights, widths = (~mask[:, :, 0]).sum(1), (~mask[:, 0]).sum(1)
    below = torch.arange(feature.shape[2], device=mask.device) * stride >= heights[:, None]
    right = torch.arange(feature.shape[3], device=mask.device) * stride >= widths[:, None]
    return below[:, :, None] | right[:, None]


def sine_position(mask: Tensor, features: int, offset: float = -0.5) -> Tensor:
    """Sine embedding of every pixel of a level, relative to the un-padded image: y features first, then x.

    Args:
        mask: [N, H, W] bool, True = padding.
        features: width of the embedding, half of it per axis.
        offset: added to the pixels' numbers, which start at 1: -0.5 gives centres; DETR uses 0.

    Returns:
        [N, H * W, features].
    """
    valid = (~mask).float()
    y, x = valid.cumsum(1), valid.cumsum(2)
    y = (y + offset) / (y[:, -1:, :] + 1e-6) * 2 * math.pi
    x = (x + offset) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat([sine(y, features // 2), sine(x, features // 2)], dim=-1).flatten(1, 2)


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

    @staticmethod
    def of(masks: Sequence[Tensor]) -> "Pyramid":
        """Make a pyramid from the padding mask [N, H, W] of each level."""
        shapes = tuple((mask.shape[1], mask.shape[2]) for mask in masks)
        valid = [(~mask).float() for mask in masks]
        ratios = [torch.stack([v[:, 0].mean(1), v[:, :, 0].mean(1)], dim=-1) for v in valid]
        extents = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float32)
        return Pyramid(
            shapes=shapes,
            padding=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            valid_ratios=torch.stack(ratios, dim=1),
            extents=extents.to(masks[0].device, non_blocking=True),  # a plain copy would wait for the stream
        )

    @property
    def tokens(self) -> int:
        """S, the number of tokens of an image."""
        return sum(height * width for height, width in self.shapes)

    def levels(self) -> list["Pyramid"]:
        """Each level as a pyramid of its own."""
        padding = self.padding.split([height * width for height, width in self.shapes], dim=1)
        return [
            Pyramid((shape,), padding[level], self.valid_ratios[:, level, None], self.extents[level, None])
            for level, shape in enumerate(self.shapes)
        ]

    def centres(self) -> Tensor:
        """Pixel centres (x, y) relative to the un-padded image, [N, S, 2]; beyond 1 in the padding."""
        device = self.valid_ratios.device
        levels = []
        for level, (height, width) in enumerate(self.shapes):
            x = torch.arange(width, device=device) + 0.5
            y = torch.arange(height, device=device) + 0.5
            grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)
            levels.append(grid / (self.valid_ratios[:, level, None] * self.extents[level]))
        return torch.cat(levels, dim=1)

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
