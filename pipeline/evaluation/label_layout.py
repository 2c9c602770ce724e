"""Positions for the labels of boxes in a drawing, so that they do not hide each other. Never fails.

The layout is greedy and deterministic, in the given order (best detections first). A label is placed at its box, or, if
there is no room, at the nearest free position. If the image is full, labels overlap as little as possible.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Point = NDArray[np.float64]  # [2] x, y
Rectangles = NDArray[np.float64]  # [n, 4] left, top, right, bottom


def place_labels(
    boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[float, float]], canvas: tuple[int, int]
) -> list[tuple[float, float]]:
    """The left top corner of each label, inside the canvas if the label fits.

    Args:
        boxes: left, top, right, bottom in pixels, most important first; may extend beyond the canvas.
        sizes: (width, height) of the labels in pixels, one per box.
        canvas: (width, height).
    """
    placed = np.empty((len(boxes), 4))
    for k, (box, (width, height)) in enumerate(zip(boxes, sizes, strict=True)):
        room = np.maximum((canvas[0] - width, canvas[1] - height), 0)
        candidates = np.clip(_spots_at(box, width, height), 0, room)
        overlaps = _overlaps(candidates, (width, height), placed[:k])
        if overlaps.min() > 0:
            candidates = np.concatenate([candidates, _spots_near(candidates[0], room, np.array([width / 2, height]))])
            overlaps = _overlaps(candidates, (width, height), placed[:k])
        corner = candidates[overlaps.argmin()]  # the first of equals, which is the preferred one
        placed[k] = *corner, corner[0] + width, corner[1] + height
    return [(float(left), float(top)) for left, top, _, _ in placed]


def _spots_at(box: Sequence[float], width: float, height: float) -> NDArray[np.float64]:
    """Left top corners of labels that touch their box, by preference: above it, below, inside, beside."""
    left, top, right, bottom = box
    rows = (top - height, bottom, top, bottom - height)
    spots = [(x, y) for y in rows for x in (left, right - width)]
    return np.array([*spots, (right, top), (left - width, top)])


def _spots_near(wanted: Point, room: Point, steps: Point) -> NDArray[np.float64]:
    """Left top corners over the whole canvas, `steps` apart, the nearest to `wanted` first."""
    columns, rows = (
        np.append(np.arange(w % step, end, step), end) for w, end, step in zip(wanted, room, steps, strict=True)
    )
    spots = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
    return spots[np.argsort(((spots - wanted) ** 2).sum(1), kind="stable")]


def _overlaps(corners: NDArray[np.float64], size: tuple[float, float], placed: Rectangles) -> NDArray[np.float64]:
    """Overlap, in square pixels, of a label of `size` at each of `corners` [n, 2] with `placed` labels [m, 4]; [n]."""
    low = np.maximum(corners[:, None], placed[None, :, :2])
    high = np.minimum((corners + size)[:, None], placed[None, :, 2:])
    shared: NDArray[np.float64] = np.clip(high - low, 0, None).prod(-1).sum(1)
    return shared
