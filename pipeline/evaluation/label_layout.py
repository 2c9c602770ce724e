"""Where the labels of boxes go in a drawing, so that they do not hide each other.

Greedy and deterministic, in the order that is given (best detections first): a label stands at its box where it can,
else at the nearest free spot. Only where the picture is full do labels overlap, as little as possible.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Point = NDArray[np.float64]  # [2] x, y
Rectangles = NDArray[np.float64]  # [n, 4] left, top, right, bottom


def place_labels(
    boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[float, float]], canvas: tuple[int, int]
) -> list[tuple[float, float]]:
    """The left top corner of each label, inside of the canvas if the label fits there.

    Args:
        boxes: left, top, right, bottom in pixels, most important first; may reach out of the canvas.
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
        corner = candidates[overlaps.argmin()]  # the first of equals, so the most wanted
        placed[k] = *corner, corner[0] + width, corner[1] + height
    return [(float(left), float(top)) for left, top, _, _ in placed]


def _spots_at(box: Sequence[float], width: float, height: float) -> NDArray[np.float64]:
    """Left top corners of labels that touch their box, by preference: above it, below, inside, beside."""
    left, top, right, bottom = box
    rows = (top - height, bottom, top, bottom - height)
    spots = [(x, y) for y in rows for x in (left, right - width)]
    return np.array([*spots, (right, top), (left - width, top)])


def _spots_near(wanted: Point, room: Point, steps: Point) -> NDArray[np.float64]:
    """Left top corners all over the canvas, `steps` apart, the nearest to `wanted` first."""
    columns, rows = (
        np.append(np.arange(w % step, end, step), end) for w, end, step in zip(wanted, room, steps, strict=True)
    )
    spots = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
    return spots[np.argsort(((spots - wanted) ** 2).sum(1), kind="stable")]


def _overlaps(corners: NDArray[np.float64], size: tuple[float, float], placed: Rectangles) -> NDArray[np.float64]:
    """Square pixels that a label of `size` at each of `corners` [n, 2] shares with `placed` labels [m, 4]; [n]."""
    low = np.maximum(corners[:, None], placed[None, :, :2])
    high = np.minimum((corners + size)[:, None], placed[None, :, 2:])
    shared: NDArray[np.float64] = np.clip(high - low, 0, None).prod(-1).sum(1)
    return shared
