"""The published augmentation of Deformable DETR, split in two: what to do (`draw`, no pixels) and doing it (`apply`).

`loader` draws the views of a whole epoch first, because `plan` groups images by the size they will have; the same draw
is repeated where the sample is decoded. A view depends on nothing but the generator and the image's size. Source: the
training recipe published with Deformable DETR (which is DETR's): flip, then with equal chance (A) resize, or (B)
resize, crop, resize. Nothing here fails on any image of at least one pixel.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import AugmentConfig

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class View:
    """One way of seeing an image: flip, then if `crop` resize to `before_crop` and crop, then resize to `out_size`."""

    flip: bool
    out_size: Size
    before_crop: Size | None = None
    crop: tuple[int, int, int, int] | None = None  # top, left, height, width in the `before_crop` image


def generator(seed: int, epoch: int, image_id: int) -> np.random.Generator:
    """The randomness of one sample in one epoch; the same on any rank, worker and machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, image_id])))


def draw(rng: np.random.Generator, size: Size, augment: AugmentConfig) -> View:
    """Draw a training view of an image of `size` (h, w)."""
    flip = rng.random() < augment.flip
    cropped = rng.random() < augment.crop
    shortest = augment.scales[rng.integers(len(augment.scales))]
    if not cropped:
        return View(flip, resized(size, shortest, augment.max_size))
    before = resized(size, augment.crop_scales[rng.integers(len(augment.crop_scales))])
    width = _crop_side(rng, before[1], augment.crop_range)
    height = _crop_side(rng, before[0], augment.crop_range)
    top = int(rng.integers(before[0] - height, endpoint=True))
    left = int(rng.integers(before[1] - width, endpoint=True))
    return View(flip, resized((height, width), shortest, augment.max_size), before, (top, left, height, width))


def evaluation_view(size: Size, augment: AugmentConfig) -> View:
    """The one view that evaluation takes: shortest side `eval_size`, longest at most `max_size`."""
    return View(False, resized(size, augment.eval_size, augment.max_size))


def resized(size: Size, shortest: int, longest: int | None = None) -> Size:
    """Output size with the aspect ratio kept, rounded as published.

    The longer side is truncated to whole pixels; where `longest` binds, the shorter side is rounded first.
    """
    small, large = min(size), max(size)
    if longest is not None and large / small * shortest > longest:
        shortest = max(1, round(longest * small / large))
    if small == shortest:
        return size
    height, width = size
    if width < height:
        return int(shortest * height / width), shortest
    return shortest, int(shortest * width / height)


def apply(
    image: Image.Image, boxes_xyxy: NDArray[np.float32], labels: NDArray[np.int64], view: View
) -> tuple[Image.Image, NDArray[np.float32], NDArray[np.int64]]:
    """Make the view.

    Args:
        image: RGB, of the size the view was drawn for.
        boxes_xyxy: [n, 4] pixels within the image.
        labels: [n].
        view: from `draw` or `evaluation_view`.

    Returns:
        The image of `view.out_size`, its boxes in pixels, and the labels; a crop drops boxes of which no area is left.
    """
    boxes = boxes_xyxy
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32)
        boxes = boxes + np.array([image.width, 0, image.width, 0], np.float32)
    if view.crop is not None and view.before_crop is not None:
        image, boxes = _resize(image, boxes, view.before_crop)
        top, left, height, width = view.crop
        image = image.crop((left, top, left + width, top + height))
        boxes = boxes - np.array([left, top, left, top], np.float32)
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        left_over = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        boxes, labels = boxes[left_over], labels[left_over]
    image, boxes = _resize(image, boxes, view.out_size)
    return image, boxes, labels


def _crop_side(rng: np.random.Generator, side: int, span: tuple[int, int]) -> int:
    """Uniform in [span[0], min(side, span[1])], or the whole side where it is shorter than span[0]."""
    return int(rng.integers(min(span[0], side), min(side, span[1]), endpoint=True))


def _resize(image: Image.Image, boxes: NDArray[np.float32], size: Size) -> tuple[Image.Image, NDArray[np.float32]]:
    height, width = size
    if image.size == (width, height):
        return image, boxes
    scale = np.array([width / image.width, height / image.height] * 2, np.float32)
    return image.resize((width, height), Image.Resampling.BILINEAR), boxes * scale
