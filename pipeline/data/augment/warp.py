"""Where boxes are after an image is turned or warped, and the rule for boxes that leave it. Never fails.

Coordinates are continuous: pixel (0, 0) covers [0, 1) x [0, 1). A warped box is the box around its four warped corners,
as torchvision's `affine` defines it.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.augment import Extras
from pipeline.data.augment.draws import Draws

Size = tuple[int, int]  # (height, width)
Boxes = NDArray[np.float32]  # [n, 4] x0, y0, x1, y1 in pixels
Labels = NDArray[np.int64]  # [n]
FILL = (124, 116, 104)  # ImageNet's mean colour, which becomes about 0 when the batch is normalised
MIN_SIDE = 1.0  # pixels; a thinner rest of a box is dropped


@dataclass(frozen=True)
class Affine:
    """A rotation, zoom and shear around the centre of the image, then a move."""

    angle: float  # degrees, clockwise as seen
    zoom: float
    shear: tuple[float, float]  # degrees along x and y
    move: tuple[float, float]  # pixels along x and y

    def matrix(self, size: Size) -> NDArray[np.float64]:
        """[3, 3]: maps (x, y, 1) of an image of `size` to the warped image; its determinant is zoom squared."""
        height, width = size
        turn, x, y = (math.radians(value) for value in (self.angle, *self.shear))
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        shear = np.array([[1.0, 0.0], [-math.tan(y), 1.0]]) @ np.array([[1.0, -math.tan(x)], [0.0, 1.0]])
        centre, matrix = np.array([width / 2, height / 2]), np.eye(3)
        matrix[:2, :2] = self.zoom * rotation @ shear
        matrix[:2, 2] = centre + self.move - matrix[:2, :2] @ centre
        return matrix


def draw_affine(size: Size, extras: Extras, draws: Draws) -> Affine:
    """A warp of an image of `size` within the bounds of `extras`."""
    angle, zoom = draws.between(-extras.rotate, extras.rotate), draws.factor(*extras.zoom)
    shear_x, shear_y = (draws.between(-extras.shear, extras.shear) for _ in range(2))
    x, y = (draws.between(-extras.translate, extras.translate) * side for side in size[::-1])
    return Affine(angle, zoom, (shear_x, shear_y), (x, y))


def warp_image(image: Image.Image, affine: Affine) -> Image.Image:
    """The warped image, of the same size; FILL where nothing is."""
    inverse = np.linalg.inv(affine.matrix((image.height, image.width)))
    data = tuple(inverse[:2].ravel().tolist())
    return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=FILL)


def warp_boxes(boxes_xyxy: Boxes, affine: Affine, size: Size) -> Boxes:
    """The boxes around the warped corners; they may leave the image of `size`, see `clip_boxes`."""
    matrix = affine.matrix(size)
    corners = boxes_xyxy[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2).astype(np.float64)
    warped = corners @ matrix[:2, :2].T + matrix[:2, 2]
    return np.concatenate([warped.min(axis=1), warped.max(axis=1)], axis=1).astype(np.float32)


def clip_boxes(boxes_xyxy: Boxes, labels: Labels, size: Size, min_visible: float) -> tuple[Boxes, Labels]:
    """Cut boxes at the edges of an image of `size`; drop those of which too little is left.

    A box stays if at least `min_visible` of its area and MIN_SIDE pixels of each side are inside.
    """
    height, width = size
    cut = np.clip(boxes_xyxy, 0, np.array([width, height, width, height], np.float32))
    left = np.maximum(cut[:, 2:] - cut[:, :2], 0).astype(np.float64)
    whole = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).astype(np.float64)
    # A box that was thinner than MIN_SIDE before may stay as it was.
    solid = (left >= np.minimum(MIN_SIDE, whole * 0.999)).all(axis=1) & (left > 0).all(axis=1)
    kept = solid & (left.prod(axis=1) >= min_visible * whole.prod(axis=1) * 0.999)  # float32 corners round
    return cut[kept], labels[kept]


def turn_image(image: Image.Image, turns: int) -> Image.Image:
    """The image turned by `turns` times 90 degrees, counterclockwise."""
    kinds = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(kinds[turns - 1]) if turns else image


def turn_boxes(boxes_xyxy: Boxes, turns: int, size: Size) -> Boxes:
    """The boxes of an image of `size` after `turn_image`."""
    for _ in range(turns):
        width = np.float32(size[1])
        x0, y0, x1, y1 = boxes_xyxy.T
        boxes_xyxy, size = np.stack([y0, width - x1, y1, width - x0], axis=1), size[::-1]
    return boxes_xyxy


def turn_size(size: Size, turns: int) -> Size:
    """(height, width) after `turn_image`."""
    return size[::-1] if turns % 2 else size
