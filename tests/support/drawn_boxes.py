"""Rectangles of one colour each on black, and the boxes that an image's pixels show, to compare with annotations."""

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.data.augment.compose import LabelledImage
from pipeline.data.augment.warp import FILL

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255))  # by label
PALETTE = np.array([*COLOURS, (0, 0, 0), FILL], np.int32)
CELL = 32  # pixels; each rectangle lies in a cell of its own, at least 6 pixels from the next


@st.composite
def drawn_images(draw: st.DrawFn, labels: tuple[int, ...] = tuple(range(6))) -> LabelledImage:
    """An image of 2 x 3 or 3 x 2 cells with a rectangle of whole pixels, 6 to 26 wide, in some of them."""
    rows, columns = draw(st.sampled_from([(2, 3), (3, 2)]))
    chosen = draw(st.lists(st.sampled_from(labels), unique=True, max_size=len(labels)))
    cells = draw(st.permutations([(row, column) for row in range(rows) for column in range(columns)]))
    boxes = []
    for row, column in cells[: len(chosen)]:
        width, height = draw(st.integers(6, CELL - 6)), draw(st.integers(6, CELL - 6))
        x = CELL * column + 3 + draw(st.integers(0, CELL - 6 - width))
        y = CELL * row + 3 + draw(st.integers(0, CELL - 6 - height))
        boxes.append((x, y, x + width, y + height))
    return draw_rectangles((CELL * rows, CELL * columns), boxes, chosen)


def draw_rectangles(size: tuple[int, int], boxes: list[tuple[int, int, int, int]], labels: list[int]) -> LabelledImage:
    """An image of `size` (h, w) with a filled rectangle per box, of its label's colour."""
    image = Image.new("RGB", size[::-1])
    pen = ImageDraw.Draw(image)
    for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=COLOURS[label])
    return LabelledImage(image, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64))


def seen_boxes(image: Image.Image) -> dict[int, NDArray[np.float32]]:
    """The box of the pixels nearest to each label's colour; colours without a pixel are left out."""
    pixels = np.asarray(image).astype(np.int32)
    nearest = ((pixels[:, :, None] - PALETTE) ** 2).sum(axis=-1).argmin(axis=-1)
    found = {}
    for label in range(len(COLOURS)):
        if len(at := np.argwhere(nearest == label)):
            (y0, x0), (y1, x1) = at.min(axis=0), at.max(axis=0) + 1
            found[label] = np.array([x0, y0, x1, y1], np.float32)
    return found


def assert_boxes_match(shown: LabelledImage, tolerance: float) -> None:
    """Each annotated box is where the pixels of its colour are, to `tolerance` pixels; labels are unique."""
    seen = seen_boxes(shown.image)
    for label, box in zip(shown.labels.tolist(), shown.boxes_xyxy, strict=True):
        np.testing.assert_allclose(box, seen[label], atol=tolerance, err_msg=f"label {label}")


def assert_dropped_are_gone(before: LabelledImage, after: LabelledImage, scale: float, min_visible: float) -> None:
    """A box that was dropped shows less than `min_visible` of its area, or a rest at most a pixel thin.

    Args:
        before: with the original boxes.
        after: with those that are left.
        scale: of lengths, from before to after.
        min_visible: the rule's share.
    """
    seen = seen_boxes(after.image)
    for label, box in zip(before.labels.tolist(), before.boxes_xyxy, strict=True):
        if label in after.labels.tolist() or label not in seen:
            continue
        left, whole = seen[label][2:] - seen[label][:2], (box[2:] - box[:2]) * scale
        assert (left - 1).prod() <= min_visible * whole.prod() or left.min() <= 2
