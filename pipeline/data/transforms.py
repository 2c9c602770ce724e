"""The published augmentation of Deformable DETR: `draw_views` draws the random choices, `apply` changes the pixels.

`loader` draws the views of a whole epoch at once, because `plan` groups images by their augmented size. Each view goes
to the process that decodes the sample. A view depends only on (seed, epoch), the sample's position in the index and its
size. The recipe is DETR's: flip, then with equal chance (A) resize, or (B) resize, crop, resize. Before it an image may
be turned, if the settings say so. Nothing here fails on an image of at least one pixel. `resample` makes the same views
with one resize instead of two; what else can be added is in `augment`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import AugmentConfig
from pipeline.config.augment import Extras
from pipeline.data.augment.warp import turn_boxes, turn_image

Size = tuple[int, int]  # (height, width) in pixels
Ints = NDArray[np.int64]
WORDS = 8  # random 32-bit words per sample and epoch: flip, crop or not, two scales, the crop's two sides and corner
DRAWS = 1  # separates this stream from others that are seeded by (seed, epoch)
TURN_WORDS = 4  # random 32-bit words per sample: turned or not, by how much, mirrored vertically or not
TURNS = 2  # as DRAWS


@dataclass(frozen=True)
class View:
    """Augmentation of one image: turn, flip; with `crop`, resize to `before_crop` and crop; resize to `out_size`."""

    flip: bool
    out_size: Size
    before_crop: Size | None = None
    crop: tuple[int, int, int, int] | None = None  # top, left, height, width in the `before_crop` image
    turns: int = 0  # of 90 degrees counterclockwise, before all else


@dataclass(frozen=True)
class EvalSize:
    """Size of evaluated images: pixels of the shortest side, maximum of the longest, and whether mirrored."""

    shortest: int
    longest: int
    flip: bool = False

    @classmethod
    def default(cls, augment: AugmentConfig) -> "EvalSize":
        """The size of the published evaluation."""
        return cls(augment.eval_size, augment.max_size)


@dataclass(frozen=True, eq=False)
class Views:
    """The views of S samples as columns, because 118,287 objects would take seconds."""

    flip: NDArray[np.bool_]  # [S]
    out_size: Ints  # [S, 2] (h, w)
    cropped: NDArray[np.bool_]  # [S]
    before_crop: Ints  # [S, 2] (h, w); valid where `cropped`
    crop: Ints  # [S, 4] top, left, height, width; valid where `cropped`
    turns: Ints  # [S]

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, i: int) -> View:
        flip, out_size, turns = bool(self.flip[i]), _pair(self.out_size[i]), int(self.turns[i])
        if not self.cropped[i]:
            return View(flip, out_size, turns=turns)
        top, left, height, width = self.crop[i].tolist()
        return View(flip, out_size, _pair(self.before_crop[i]), (top, left, height, width), turns)

    def take(self, rows: Ints) -> "Views":
        """The views with these numbers, in this order."""
        return Views(*(getattr(self, field.name)[rows] for field in fields(self)))


def join_views(parts: Sequence[Views]) -> Views:
    """The views of all parts, one part after the other."""
    return Views(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Views)))


def draw_views(sizes: Ints, seed: int, epoch: int, augment: AugmentConfig, copy: int = 0) -> Views:
    """Draw the training views of all samples in one epoch.

    Philox is a counter-based generator: sample i always gets the i-th block of words.

    Args:
        sizes: [S, 2] original (h, w) by position in the index.
        seed: of the run.
        epoch: from 0.
        augment: the recipe.
        copy: which of the times that an epoch shows a sample, from 0; each has other views.
    """
    turns, mirrored = _draw_turns(len(sizes), [seed, epoch, TURNS, copy], augment.extras())
    sizes = np.where(turns[:, None] % 2 == 1, sizes[:, ::-1], sizes)
    if augment.preset == "none":
        return replace(evaluation_views(sizes, EvalSize.default(augment)), flip=mirrored, turns=turns)
    words = _words(len(sizes), WORDS, [seed, epoch, DRAWS, *[copy] * (copy > 0)])
    shortest = np.array(augment.scales, np.int64)[_below(words[2], len(augment.scales))]
    before_side = np.array(augment.crop_scales, np.int64)[_below(words[3], len(augment.crop_scales))]
    before = resize_sizes(sizes, before_side)
    low, high = (np.minimum(before, side) for side in augment.crop_range)  # the whole side where it is shorter
    crop_size = low + _below(words[4:6].T, high - low + 1)
    corner = _below(words[6:8].T, before - crop_size + 1)
    cropped = words[1] < augment.crop * 2.0**32
    out = resize_sizes(np.where(cropped[:, None], crop_size, sizes), shortest, augment.max_size)
    flip = (words[0] < augment.flip * 2.0**32) ^ mirrored
    return Views(flip, out, cropped, before, np.concatenate([corner, crop_size], axis=1), turns)


def evaluation_views(sizes: Ints, eval_size: EvalSize) -> Views:
    """The views of images of the original sizes [S, 2] at an evaluation size."""
    nothing = np.zeros((len(sizes), 4), np.int64)
    out = resize_sizes(sizes, np.int64(eval_size.shortest), eval_size.longest)
    return Views(np.full(len(sizes), eval_size.flip), out, nothing[:, 0] > 0, nothing[:, :2], nothing, nothing[:, 0])


def evaluation_view(size: Size, augment: AugmentConfig) -> View:
    """The view of an ordinary evaluation: shortest side `eval_size`, longest at most `max_size`."""
    return evaluation_views(np.array([size], np.int64), EvalSize.default(augment))[0]


def resize_sizes(sizes: Ints, shortest: Ints | np.int64, longest: int | None = None) -> Ints:
    """Output sizes [S, 2] with the aspect ratio kept, rounded as published.

    The longer side is truncated to whole pixels; where `longest` limits it, the shorter side is rounded first. Rounding
    makes the longer side at most twice `longest`; only a thin line of pixels, whose shorter side would be less than
    one pixel, does not keep its ratio.
    """
    small, large = sizes.min(axis=1), sizes.max(axis=1)
    side = np.broadcast_to(shortest, small.shape)
    if longest is not None:
        bound = np.maximum(1, np.rint(longest * small / large)).astype(np.int64)
        side = np.where(large / small * side > longest, bound, side)
    ratio_kept = (side[:, None] * sizes / small[:, None]).astype(np.int64)  # the shorter side becomes `side`
    out = np.where((small == side)[:, None], sizes, ratio_kept)
    return out if longest is None else np.minimum(out, 2 * longest)


def apply(
    image: Image.Image, boxes_xyxy: NDArray[np.float32], labels: NDArray[np.int64], view: View
) -> tuple[Image.Image, NDArray[np.float32], NDArray[np.int64]]:
    """Apply the view with the published arithmetic.

    Args:
        image: RGB, of the size the view was drawn for.
        boxes_xyxy: [n, 4] pixels within the image.
        labels: [n].
        view: from `draw_views` or `evaluation_view`.

    Returns:
        The image of `view.out_size`, its boxes in pixels, and the labels; a crop drops boxes that lose all their area.
    """
    boxes = turn_boxes(boxes_xyxy, view.turns, (image.height, image.width))
    image = turn_image(image, view.turns)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32)
        boxes = boxes + np.array([image.width, 0, image.width, 0], np.float32)
    if view.crop is not None and view.before_crop is not None:
        image, boxes = _resize(image, boxes, view.before_crop)
        top, left, height, width = view.crop
        image = image.crop((left, top, left + width, top + height))
        boxes = boxes - np.array([left, top, left, top], np.float32)
        boxes, labels = keep_visible_boxes(boxes, labels, (height, width))
    image, boxes = _resize(image, boxes, view.out_size)
    return image, boxes, labels


def keep_visible_boxes(
    boxes_xyxy: NDArray[np.float32], labels: NDArray[np.int64], size: tuple[float, float]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Clamp boxes to an image of `size` (h, w) and drop those without area; returns boxes and labels."""
    height, width = size
    boxes = np.clip(boxes_xyxy, 0, np.array([width, height, width, height], np.float32))
    left_over = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes[left_over], labels[left_over]


def _draw_turns(count: int, key: list[int], extras: Extras) -> tuple[Ints, NDArray[np.bool_]]:
    """Of each sample the turns of 90 degrees, and whether it is mirrored as well: both make a vertical flip."""
    if not extras.turns:
        return np.zeros(count, np.int64), np.zeros(count, np.bool_)
    words = _words(count, TURN_WORDS, key)
    turns = np.where(words[0] < extras.quarter_turns * 2.0**32, 1 + _below(words[1], 3), 0)
    mirrored = words[2] < extras.vertical_flip * 2.0**32
    return (turns + 2 * mirrored) % 4, mirrored


def _words(count: int, per_sample: int, key: list[int]) -> Ints:
    """[per_sample, count] random 32-bit words; sample i has the i-th block of the stream."""
    blocks = np.random.Philox(np.random.SeedSequence(key)).random_raw(count * per_sample // 2)
    halves = np.stack([blocks & 0xFFFFFFFF, blocks >> np.uint64(32)], axis=1)
    words: Ints = halves.reshape(count, per_sample).T.astype(np.int64)
    return words


def _below(words: Ints, limit: Ints | int) -> Ints:
    """32 random bits -> a whole number in [0, limit); its bias, limit / 2^32, is below a millionth here."""
    return words * limit >> 32


def _pair(row: Ints) -> Size:
    height, width = row.tolist()
    return height, width


def _resize(image: Image.Image, boxes: NDArray[np.float32], size: Size) -> tuple[Image.Image, NDArray[np.float32]]:
    height, width = size
    if image.size == (width, height):
        return image, boxes
    scale = np.array([width / image.width, height / image.height] * 2, np.float32)
    return image.resize((width, height), Image.Resampling.BILINEAR), boxes * scale
