"""Reads LabelMe JSON: a file per image, with shapes whose points come in any order.

Rectangles, polygons, circles and masks become the box around them; points and lines have none. `imagePath` may be a
path of another machine, with backslashes; its folders count only if they are there. Sizes and points are those of the
image as viewers show it. An image without a file has not been labelled and is left out.
"""

import json
import math
from typing import Any

from pipeline.data.images import MAX_BYTES
from pipeline.data.importing.coco import LABELME
from pipeline.data.importing.records import Box, Finder, LabelledImage, Split, find_shared, make_splits
from pipeline.data.importing.tree import Tree, split_of_path
from pipeline.data.sharding.orientation import Exif
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.errors import ShardError

MAX_JSON_BYTES = 2 * MAX_BYTES  # the file may hold the image itself
AREAS = ("rectangle", "polygon", "circle", "mask", "rotation", "oriented_rectangle")

Corners = tuple[float, float, float, float]


class LabelMeLayout:
    """A JSON file per image."""

    name = "labelme"
    title = "LabelMe JSON"

    def find(self, tree: Tree) -> list[str]:
        """See `Layout`."""
        return [name for name in tree.names(".json") if LABELME.search(tree.head(name))]

    def read(self, tree: Tree, exif: Exif, findings: Findings) -> list[Split]:
        """See `Layout`."""
        finder = Finder(tree)
        read: dict[str, tuple[str, int, int, list[tuple[str, Corners]]]] = {}  # by label file
        for name in self.find(tree):
            try:
                document: Any = json.loads(tree.text(name, MAX_JSON_BYTES))
                path, shapes = document.get("imagePath"), document["shapes"]
                if not isinstance(shapes, list):
                    raise ValueError("its shapes are no list")
            except (ValueError, KeyError, AttributeError, RecursionError) as error:
                findings.add(Rule.BAD_LABEL, f"{name} is not LabelMe JSON: {error}")
                continue
            image = (finder.named(path, name) if isinstance(path, str) else None) or finder.beside(name)
            if image is None:
                findings.add(Rule.MISSING_FILE, f"{path!r:.100} of {name}")
                continue
            try:
                height, width = _size(document) or tree.image_size(image, exif)
            except ShardError as error:
                findings.add(Rule.UNREADABLE_FILE, f"{image} {error}")
                continue
            boxes = _read_shapes(shapes, name, findings)
            read[name] = (image, height, width, boxes)
        for name in find_shared({name: image for name, (image, *_) in read.items()}, findings):
            del read[name]
        names = sorted({label for *_, boxes in read.values() for label, _ in boxes})
        numbers = {name: number for number, name in enumerate(names, start=1)}
        labelled: dict[str | None, list[LabelledImage]] = {}
        for image, height, width, boxes in read.values():
            objects = tuple(Box(numbers[label], *corners) for label, corners in boxes)
            labelled.setdefault(split_of_path(image), []).append(LabelledImage(image, height, width, objects))
        return make_splits(labelled, {number: name for name, number in numbers.items()})


def _size(document: dict[str, Any]) -> tuple[int, int] | None:
    height, width = document.get("imageHeight"), document.get("imageWidth")
    return (height, width) if type(height) is int and type(width) is int and min(height, width) > 0 else None


def _read_shapes(shapes: list[Any], name: str, findings: Findings) -> list[tuple[str, Corners]]:
    """(class, box) of each shape with an area; the others are findings."""
    found = []
    for number, shape in enumerate(shapes, start=1):
        where = f"{name} shape {number}"
        kind = shape.get("shape_type") or "polygon" if isinstance(shape, dict) else None
        if kind is not None and kind not in AREAS:
            findings.add(Rule.SHAPE_WITHOUT_AREA, f"{where} ({kind!r:.30})")
            continue
        label = shape.get("label") if isinstance(shape, dict) else None
        corners = _around(shape.get("points"), kind) if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip() or corners is None:
            findings.add(Rule.BAD_LABEL, f"{where} has no label or no points")
        else:
            found.append((label.strip(), corners))
    return found


def _around(points: Any, kind: Any) -> Corners | None:
    """The box around points; a circle has its centre and a point on its edge. None if they are not valid."""
    try:
        xs, ys = zip(*((float(x), float(y)) for x, y in points), strict=True)
    except (TypeError, ValueError, OverflowError):
        return None
    if len(xs) < 2 or not all(abs(value) < 1e9 for value in (*xs, *ys)):
        return None
    if kind == "circle":
        radius = math.hypot(xs[1] - xs[0], ys[1] - ys[0])
        return xs[0] - radius, ys[0] - radius, xs[0] + radius, ys[0] + radius
    more = 1 if kind == "mask" else 0  # its last row and column belong to it
    return min(xs), min(ys), max(xs) + more, max(ys) + more
