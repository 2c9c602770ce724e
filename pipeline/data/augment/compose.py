"""Mosaics of four images, and objects cut out of one image and pasted into another. Never fails.

A mosaic has the size of the image it replaces, so the plan knows it without knowing the others. Where objects are
pasted is drawn until no box is hidden by more than the rule allows; a box that is partly hidden stays whole.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.config.augment import Extras
from pipeline.data.augment.draws import Draws
from pipeline.data.augment.warp import Boxes, Labels, Size, clip_boxes
from pipeline.data.transforms import keep_visible_boxes

CROSSING = (0.3, 0.7)  # where the four tiles meet, as a share of each side
PASTE_SCALE = (0.5, 1.5)  # of a pasted object
PLACES = 10  # that are tried for an object


@dataclass(frozen=True)
class LabelledImage:
    """An image with its boxes, in pixels of this image."""

    image: Image.Image  # RGB
    boxes_xyxy: Boxes
    labels: Labels

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.image.height, self.image.width


@dataclass(frozen=True)
class Tile:
    """A part of a mosaic: where it is, and which part of an image it shows."""

    left: int
    top: int
    width: int
    height: int
    corner: tuple[float, float]  # x, y of the shown part, as a share of the image's rest beside it

    def scale(self, size: Size) -> float:
        """The factor by which an image of `size` covers the tile."""
        return max(self.width / size[1], self.height / size[0])

    def shown(self, size: Size) -> tuple[float, float, float, float]:
        """The part of an image of `size` that the tile shows: left, top, right, bottom."""
        width, height = self.width / self.scale(size), self.height / self.scale(size)
        left, top = self.corner[0] * (size[1] - width), self.corner[1] * (size[0] - height)
        return max(left, 0.0), max(top, 0.0), min(left + width, float(size[1])), min(top + height, float(size[0]))


def draw_tiles(size: Size, draws: Draws) -> list[Tile]:
    """The four tiles of a mosaic of `size`, in a random order; none if a side has less than two pixels."""
    height, width = size
    if min(size) < 2:
        return []
    y, x = (min(side - 1, max(1, round(side * draws.between(*CROSSING)))) for side in size)
    spans = [(0, 0, x, y), (x, 0, width - x, y), (0, y, x, height - y), (x, y, width - x, height - y)]
    tiles = [Tile(*span, (draws.share(), draws.share())) for span in spans]
    return [tiles[k] for k in draws.order(4)]


def make_mosaic(size: Size, tiles: list[Tile], images: list[LabelledImage], min_visible: float) -> LabelledImage:
    """The mosaic of one image per tile; each covers its tile, without a border and with its aspect ratio kept."""
    canvas = Image.new("RGB", size[::-1])
    boxes, labels = [], []
    for tile, labelled in zip(tiles, images, strict=True):
        shown = tile.shown(labelled.size)
        part = labelled.image.resize((tile.width, tile.height), Image.Resampling.BILINEAR, box=shown)
        canvas.paste(part, (tile.left, tile.top))
        corner = np.array([*shown[:2], *shown[:2]], np.float32)
        scale = np.array([tile.width / (shown[2] - shown[0]), tile.height / (shown[3] - shown[1])] * 2, np.float32)
        cut = clip_boxes(
            (labelled.boxes_xyxy - corner) * scale, labelled.labels, (tile.height, tile.width), min_visible
        )
        boxes.append(cut[0] + np.array([tile.left, tile.top] * 2, np.float32))
        labels.append(cut[1])
    # Far from the corner, float32 cannot tell the sides of the tiniest boxes apart.
    return LabelledImage(canvas, *keep_visible_boxes(np.concatenate(boxes), np.concatenate(labels), size))


def paste_objects(target: LabelledImage, source: LabelledImage, extras: Extras, draws: Draws) -> LabelledImage:
    """The target with up to `paste_boxes` objects of the source, cut out along their boxes and resized."""
    image = target.image.copy()
    boxes, labels = [*target.boxes_xyxy], [*target.labels.tolist()]
    hidden = [0.0] * len(boxes)
    wanted = 1 + draws.below(extras.paste_boxes)
    for k in draws.order(len(source.labels))[:wanted]:
        box = source.boxes_xyxy[k]
        left, top, right, bottom = (int(side) for side in (*np.floor(box[:2]), *np.ceil(box[2:])))
        width, height = right - left, bottom - top
        scale = min(draws.factor(*PASTE_SCALE), image.width / width, image.height / height)
        extent = (max(1, int(width * scale)), max(1, int(height * scale)))
        for _ in range(PLACES):
            x, y = (draws.below(side - own + 1) for side, own in zip(image.size, extent, strict=True))
            covers = [_covered(old, (x, y, x + extent[0], y + extent[1])) for old in boxes]
            if all(old + new <= 1 - extras.min_visible for old, new in zip(hidden, covers, strict=True)):
                break
        else:
            continue
        part = source.image.crop((left, top, right, bottom)).resize(extent, Image.Resampling.BILINEAR)
        image.paste(part, (x, y))
        # What else is in the cut-out keeps its box, by the rule for an edge; the object itself is all inside.
        around = source.boxes_xyxy - np.array([left, top] * 2, np.float32)
        inside, with_it = clip_boxes(around, source.labels, (height, width), extras.min_visible)
        stretch = np.array([extent[0] / width, extent[1] / height] * 2, np.float32)
        moved = inside * stretch + np.array([x, y] * 2, np.float32)
        moved, with_it = keep_visible_boxes(moved, with_it, target.size)
        boxes += list(moved)
        labels += with_it.tolist()
        hidden = [*(old + new for old, new in zip(hidden, covers, strict=True)), *[0.0] * len(with_it)]
    return LabelledImage(image, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64))


def _covered(box: Boxes, by: tuple[float, float, float, float]) -> float:
    """The share of a box that a rectangle covers."""
    x0, y0, x1, y1 = map(float, box)
    width, height = min(x1, by[2]) - max(x0, by[0]), min(y1, by[3]) - max(y0, by[1])
    return max(width, 0.0) * max(height, 0.0) / ((x1 - x0) * (y1 - y0))
