"""Images of an analysis with their objects beside their detections, as parts of a page.

Raises what the source of the images raises, e.g. ShardError.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from pipeline.data.dataset import DetectionDataset
from pipeline.evaluation.analysis.result import ImagePair, ImageResult
from pipeline.evaluation.drawing import DrawnBox, draw_boxes, put_beside
from pipeline.pages.parts import Cell, Column, ImageFile, Part, Table

PANEL_SIDE = 480  # pixels of the longest side of each of the images beside each other
LABELLED_BOXES = 16  # in a panel with more, only what is missed or wrong has a label
QUALITY = 82  # of JPEG
RIGHT, WRONG, CROWD = (47, 127, 193), (230, 120, 20), (150, 150, 150)
COLOURS = "Blue: found objects, correct detections. Orange: missed objects, wrong detections. Grey: crowd regions."

ReadImage = Callable[[int], Image.Image]  # by image id


def reader_of(data: DetectionDataset) -> ReadImage:
    """The decoded images of a shard folder by image id. They raise ShardError; an id must exist."""
    ids = data.index.samples.image_id

    def read(image_id: int) -> Image.Image:
        return data.sample(int(np.searchsorted(ids, image_id))).image

    return read


def draw_result(result: ImageResult, read: ReadImage, names: Mapping[int, str]) -> ImageFile:
    """An image with its objects beside its detections, and its errors as a table."""
    image = read(result.image_id)
    panels = [
        ("ground truth", _draw_objects(image, result, names)),
        ("detections", _draw_detections(image, result, names)),
    ]
    return _file(panels, result.image_id, describe(result), [table_of(result, names)])


def draw_pair(pair: ImagePair, read: ReadImage, names: Mapping[int, str]) -> ImageFile:
    """An image with its objects, the detections of this model and those of the other one."""
    image = read(pair.this.image_id)
    panels = [
        ("ground truth", _draw_objects(image, pair.this, names)),
        ("this model", _draw_detections(image, pair.this, names)),
        ("other model", _draw_detections(image, pair.other, names)),
    ]
    caption = f"this model: {describe(pair.this)}; other: {describe(pair.other)}"
    return _file(panels, pair.this.image_id, caption, [table_of(pair.this, names)])


def describe(result: ImageResult) -> str:
    """The counts of an image as text."""
    return f"{result.correct} correct, {result.wrong} wrong, {result.missed} missed, F1 {result.f1:.2f}"


def table_of(result: ImageResult, names: Mapping[int, str]) -> Table:
    """The errors of an image: missed objects, then wrong detections."""
    rows: list[list[Cell]] = [["missed", names[each.category_id], None] for each in result.objects if not each.found]
    rows += [[each.cause, names[each.category_id], each.score] for each in result.detections if each.cause]
    columns = [Column("error"), Column("class"), Column("score")]
    return Table(f"Errors of image {result.image_id}", columns, rows)


def _file(panels: Sequence[tuple[str, Image.Image]], image_id: int, text: str, details: Iterable[Part]) -> ImageFile:
    drawn, buffer = put_beside(panels), io.BytesIO()
    drawn.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    described = f"Image {image_id}, {', '.join(title for title, _ in panels)}: {text}"
    return ImageFile(buffer.getvalue(), drawn.size, f"Image {image_id}: {text}", described, tuple(details))


def _draw_objects(image: Image.Image, result: ImageResult, names: Mapping[int, str]) -> Image.Image:
    brief, boxes = len(result.objects) > LABELLED_BOXES, []
    for each in result.objects:
        colour = CROWD if each.crowd else RIGHT if each.found else WRONG
        name = "" if brief and each.found else names[each.category_id]
        boxes.append(DrawnBox(each.box_xywh, each.category_id, name, "crowd" if each.crowd and name else "", colour))
    return draw_boxes(image, _on_top(boxes), PANEL_SIDE)


def _draw_detections(image: Image.Image, result: ImageResult, names: Mapping[int, str]) -> Image.Image:
    brief, boxes = len(result.detections) > LABELLED_BOXES, []
    for each in result.detections:
        name, note = names[each.category_id], f"{each.score:.2f}"
        if brief and not each.cause:
            name = note = ""
        colour = WRONG if each.cause else RIGHT
        boxes.append(DrawnBox(each.box_xywh, each.category_id, name, note, colour))
    return draw_boxes(image, _on_top(boxes), PANEL_SIDE)


def _on_top(boxes: list[DrawnBox]) -> list[DrawnBox]:
    """Errors above all others."""
    return sorted(boxes, key=lambda box: box.colour != WRONG)
