"""The published views with one resample: `data.augment.resample=fused`, about twice as fast as `transforms.apply`.

Flip, resize, crop, resize is one affine map. So the crop is cut from the decoded image and scaled once, by torch's
uint8 kernel: a third of Pillow's time, and some values differ by one grey level. Two things differ from the published
arithmetic: the blur of the first resize is missing, and the crop's edges are rounded to whole pixels of the source.
Boxes follow the pixels exactly. Where the view is much smaller than the image, a JPEG is decoded at 1/2, 1/4 or 1/8
of its size. Nothing here fails on an image of at least one pixel.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from pipeline.data.augment.warp import turn_boxes, turn_image, turn_size
from pipeline.data.transforms import Size, View, keep_visible_boxes

Box = tuple[float, float, float, float]  # left, top, right, bottom


def source_box(view: View, size: Size) -> Box:
    """The part of the turned image of `size` (h, w) that a view shows, in pixels of the image before the flip."""
    height, width = size
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    if view.crop is not None and view.before_crop is not None:
        y, x, crop_height, crop_width = view.crop
        down, across = height / view.before_crop[0], width / view.before_crop[1]
        left, top, right, bottom = x * across, y * down, (x + crop_width) * across, (y + crop_height) * down
    return (width - right, top, width - left, bottom) if view.flip else (left, top, right, bottom)


def decoded_size(view: View, size: Size) -> Size:
    """The smallest (h, w) of the whole image, before it is turned, that gives the view without upscaling."""
    left, top, right, bottom = source_box(view, turn_size(size, view.turns))
    scale = max(view.out_size[0] / (bottom - top), view.out_size[1] / (right - left))
    return math.ceil(size[0] * scale), math.ceil(size[1] * scale)


def apply_fused(
    image: Image.Image,
    shrink: int,
    boxes_xyxy: NDArray[np.float32],
    labels: NDArray[np.int64],
    view: View,
    size: Size,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    """Apply the view with one resize.

    Args:
        image: RGB, decoded at 1/`shrink` of the original size.
        shrink: 1, 2, 4 or 8.
        boxes_xyxy: [n, 4] pixels of the original image.
        labels: [n].
        view: from `transforms.draw_views`.
        size: (h, w) of the original image.

    Returns:
        uint8 [3, h, w] of `view.out_size`, its boxes in pixels, and the labels; a crop drops boxes that lose all their
        area.
    """
    boxes_xyxy = turn_boxes(boxes_xyxy, view.turns, size)
    image = turn_image(image, view.turns)
    left, top, right, bottom = _on_pixels(source_box(view, turn_size(size, view.turns)), shrink, image)
    if (right - left, bottom - top) != image.size:
        image = image.crop((left, top, right, bottom))
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    height, width = view.out_size
    # Planar layout: the kernel takes an eighth longer than with channels last, but the planar batch is written in a
    # sixth of the time. Pillow splits the channels at the source's size.
    pixels = torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))
    if image.size != (width, height):
        pixels = interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0]
    boxes = boxes_xyxy / np.float32(shrink) - np.array([left, top, left, top], np.float32)
    boxes, labels = keep_visible_boxes(boxes, labels, (bottom - top, right - left))
    boxes = boxes * np.array([width / (right - left), height / (bottom - top)] * 2, np.float32)
    if view.flip:
        boxes = np.array([width, 0, width, 0], np.float32) + boxes[:, [2, 1, 0, 3]] * np.array(
            [-1, 1, -1, 1], np.float32
        )
    return pixels.numpy(), boxes, labels


def _on_pixels(box: Box, shrink: int, image: Image.Image) -> tuple[int, int, int, int]:
    """`box` in whole pixels of the decoded image, at least one in each direction."""
    left, top = (max(0, min(round(box[k] / shrink), side - 1)) for k, side in enumerate(image.size))
    right = max(left + 1, min(round(box[2] / shrink), image.width))
    bottom = max(top + 1, min(round(box[3] / shrink), image.height))
    return left, top, right, bottom
