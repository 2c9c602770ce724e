"""The boxes of a record that training uses: no crowd regions, clamped to the image, none without area.

A record keeps its original annotations. This rule is applied whenever a sample is read, counted or checked. Malformed
annotations raise the errors of Python and NumPy, which the callers translate.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def clamp_boxes(
    boxes_xywh: NDArray[np.float32], sizes: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Convert boxes to corners clamped to their image, and find those with area, as the published recipe does.

    Args:
        boxes_xywh: [n, 4] pixels.
        sizes: (height, width) of the image, [2] or [n, 2].

    Returns:
        boxes_xyxy [n, 4], and a mask [n] of the boxes to train on.
    """
    corners = boxes_xywh.copy()
    corners[:, 2:] += corners[:, :2]
    limits = sizes[..., [1, 0, 1, 0]]
    np.clip(corners, 0, limits, out=corners)
    return corners, np.all(corners[:, 2:] > corners[:, :2], axis=1)


def usable_boxes(annotations: Iterable[dict[str, Any]], size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """The boxes that training uses, and their categories, by the published recipe.

    Args:
        annotations: dicts with bbox (xywh, pixels), iscrowd and category_id.
        size: (height, width) of the image.

    Returns:
        float32 boxes_xyxy [n, 4] in pixels, and their category ids.
    """
    boxes, kept = usable_annotations(annotations, size)
    return boxes, [annotation["category_id"] for annotation in kept]


def usable_annotations(
    annotations: Iterable[dict[str, Any]], size: tuple[int, int]
) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
    """As `usable_boxes`, with the annotations instead of their categories."""
    single = [annotation for annotation in annotations if not annotation["iscrowd"]]
    boxes = np.array([annotation["bbox"] for annotation in single], np.float32).reshape(-1, 4)
    corners, solid = clamp_boxes(boxes, np.array(size, np.float32))
    return corners[solid], [single[i] for i in np.flatnonzero(solid)]
