"""The published augmentation of Deformable DETR, split in two: what to do (`draw`, no pixels) and doing it (`apply`).

`loader` draws the views of a whole epoch at once, because `plan` groups images by the size they will have, and hands
each view to the process that decodes the sample. A view depends on nothing but (seed, epoch), the sample's position in
the index and its size. Source: the training recipe published with Deformable DETR (which is DETR's): flip, then with
equal chance (A) resize, or (B) resize, crop, resize. Nothing here fails on any image of at least one pixel.
`resample` does the same views with one resize instead of two.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import AugmentConfig

Size = tuple[int, int]  # (height, width) in pixels
Ints = NDArray[np.int64]
WORDS = 8  # random 32-bit words per sample and epoch: flip, crop or not, two scales, the crop's two sides and corner
DRAWS = 1  # keeps this stream apart from others that are seeded by (seed, epoch)


@dataclass(frozen=True)
class View:
    """One way of seeing an image: flip, then if `crop` resize to `before_crop` and crop, then resize to `out_size`."""

    flip: bool
    out_size: Size
    before_crop: Size | None = None
    crop: tuple[int, int, int, int] | None = None  # top, left, height, width in the `before_crop` image


@dataclass(frozen=True)
class Look:
    """How evaluation sees images: shortest side, most pixels of the longest, and whether mirrored."""

    shortest: int
    longest: int
    flip: bool = False

    @classmethod
    def usual(cls, augment: AugmentConfig) -> "Look":
        """The one that the published evaluation takes."""
        return cls(augment.eval_size, augment.max_size)


@dataclass(frozen=True, eq=False)
class Views:
    """The views of S samples as columns, because 118,287 objects would take seconds."""

    flip: NDArray[np.bool_]  # [S]
    out_size: Ints  # [S, 2] (h, w)
    cropped: NDArray[np.bool_]  # [S]
    before_crop: Ints  # [S, 2] (h, w); meant where `cropped`
    crop: Ints  # [S, 4] top, left, height, width; meant where `cropped`

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, i: int) -> View:
        flip, out_size = bool(self.flip[i]), _pair(self.out_size[i])
        if not self.cropped[i]:
            return View(flip, out_size)
        top, left, height, width = self.crop[i].tolist()
        return View(flip, out_size, _pair(self.before_crop[i]), (top, left, height, width))


def draw(sizes: Ints, seed: int, epoch: int, augment: AugmentConfig) -> Views:
    """The training views of all samples in one epoch.

    Philox is a generator by counter: the words of sample i are its i-th block, whatever else is drawn.

    Args:
        sizes: [S, 2] original (h, w) by position in the index.
        seed: of the run.
        epoch: from 0.
        augment: the recipe.
    """
    blocks = np.random.Philox(np.random.SeedSequence([seed, epoch, DRAWS])).random_raw(len(sizes) * WORDS // 2)
    halves = np.stack([blocks & 0xFFFFFFFF, blocks >> np.uint64(32)], axis=1)
    words = halves.reshape(len(sizes), WORDS).T.astype(np.int64)
    shortest = np.array(augment.scales, np.int64)[_below(words[2], len(augment.scales))]
    before_side = np.array(augment.crop_scales, np.int64)[_below(words[3], len(augment.crop_scales))]
    before = resized_all(sizes, before_side)
    low, high = (np.minimum(before, side) for side in augment.crop_range)  # the whole side where it is shorter
    crop_size = low + _below(words[4:6].T, high - low + 1)
    corner = _below(words[6:8].T, before - crop_size + 1)
    cropped = words[1] < augment.crop * 2.0**32
    out = resized_all(np.where(cropped[:, None], crop_size, sizes), shortest, augment.max_size)
    return Views(words[0] < augment.flip * 2.0**32, out, cropped, before, np.concatenate([corner, crop_size], axis=1))


def evaluation_views(sizes: Ints, look: Look) -> Views:
    """The views of images of the original sizes [S, 2] under a look."""
    nothing = np.zeros((len(sizes), 4), np.int64)
    out = resized_all(sizes, np.int64(look.shortest), look.longest)
    return Views(np.full(len(sizes), look.flip), out, nothing[:, 0] > 0, nothing[:, :2], nothing)


def evaluation_view(size: Size, augment: AugmentConfig) -> View:
    """The one view that evaluation takes: shortest side `eval_size`, longest at most `max_size`."""
    return evaluation_views(np.array([size], np.int64), Look.usual(augment))[0]


def resized_all(sizes: Ints, shortest: Ints | np.int64, longest: int | None = None) -> Ints:
    """Output sizes [S, 2] with the aspect ratio kept, rounded as published.

    The longer side is truncated to whole pixels; where `longest` binds, the shorter side is rounded first.
    """
    small, large = sizes.min(axis=1), sizes.max(axis=1)
    side = np.broadcast_to(shortest, small.shape)
    if longest is not None:
        bound = np.maximum(1, np.rint(longest * small / large)).astype(np.int64)
        side = np.where(large / small * side > longest, bound, side)
    ratio_kept = (side[:, None] * sizes / small[:, None]).astype(np.int64)  # the shorter side comes out as `side`
    return np.where((small == side)[:, None], sizes, ratio_kept)


def apply(
    image: Image.Image, boxes_xyxy: NDArray[np.float32], labels: NDArray[np.int64], view: View
) -> tuple[Image.Image, NDArray[np.float32], NDArray[np.int64]]:
    """Make the view with the published arithmetic.

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
        boxes, labels = within(boxes, labels, (height, width))
    image, boxes = _resize(image, boxes, view.out_size)
    return image, boxes, labels


def within(
    boxes_xyxy: NDArray[np.float32], labels: NDArray[np.int64], size: tuple[float, float]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes clamped to an image of `size` (h, w), without those of which no area is left, and their labels."""
    height, width = size
    boxes = np.clip(boxes_xyxy, 0, np.array([width, height, width, height], np.float32))
    left_over = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes[left_over], labels[left_over]


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
