"""Stores the annotations of a file while it is read: the JSON of each, and columns of its numbers.

With the columns, checks over a million annotations run in NumPy. The JSON keeps every number as it was written, so an
integer stays an integer; only a box that CVAT has rotated becomes the box around it. A faulty annotation is added to
the findings and not to the columns.
"""

import json
import math
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.records import clamp_boxes
from pipeline.data.sharding.refused import Refused, id_key, whole_ids
from pipeline.data.sharding.rules import SHOWN, Findings, Rule

MAX_ID = 2**63 - 1
MAX_NUMBER = 1e9  # above any real box in pixels or square pixels, far below the overflow of float32
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
MAX_NUMBER_CHARACTERS = 40  # of a number in quotes
SHARE = 0.01  # of the image: how far a box given in shares of it may leave it by rounding
REQUIRED = ("id", "image_id", "category_id", "bbox")

_encode = json.JSONEncoder(separators=(",", ":"), sort_keys=True, allow_nan=False).encode


def is_id(value: Any, largest: int = MAX_ID) -> bool:
    """Whether this is an integer from 0 to `largest`; true and false are not."""
    return type(value) is int and 0 <= value <= largest


class Columns:
    """Collects annotations (`add`), compares them with images and categories (`check`), makes the `records`."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])
        self._ids, self._images, self._categories = array("q"), array("q"), array("q")
        self._boxes, self._areas = array("d"), array("d")
        self._crowd, self._masked = array("b"), array("b")
        self._unlisted: dict[tuple[Rule, str], tuple[int, list[str]]] = {}  # by `id_key`: how many, first examples
        self.refused = Refused()

    def add(self, entry: Any, position: int, findings: Findings) -> None:
        """Add one annotation, the `position`-th of the file's list."""
        if not isinstance(entry, dict) or any(name not in entry for name in REQUIRED):
            lacks = [name for name in REQUIRED if not isinstance(entry, dict) or name not in entry]
            self._refuse(entry, Rule.MALFORMED, f"annotation number {position} has no {', '.join(lacks)}", findings)
            return
        own, image, category, bbox = (entry[name] for name in REQUIRED)
        area, crowd = entry.get("area"), entry.get("iscrowd", 0)
        quoted = any(type(value) is str for value in (area, crowd, *(bbox if isinstance(bbox, list) else ())))
        if quoted:
            area, crowd = _unquote(area), _unquote(crowd)
            bbox = [_unquote(value) for value in bbox] if isinstance(bbox, list) else bbox
        if not is_id(own):
            self._refuse(entry, Rule.BAD_ID, f"annotation id {own!r:.30}", findings)
            return
        where = f"annotation {own} of image {image!r:.30}"
        if not is_id(image):
            self._refuse_unlisted(entry, Rule.UNKNOWN_IMAGE, image, f"{where} (image_id {image!r:.30})")
            return
        if not is_id(category):
            self._refuse_unlisted(entry, Rule.UNKNOWN_CATEGORY, category, f"{where} (category_id {category!r:.30})")
            return
        fault = None
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox))):
            fault = Rule.BAD_BOX, f"bbox {bbox!r:.60}"
        elif not (area is None or _is_number(area)):
            fault = Rule.BAD_AREA, f"area {area!r:.30}"
        elif crowd not in (0, 1):
            fault = Rule.BAD_CROWD, f"iscrowd {crowd!r:.30}"
        if fault:
            self._refuse(entry, fault[0], f"{where} ({fault[1]})", findings)
            return
        if quoted:
            findings.add(Rule.QUOTED_NUMBER, where)
        if min(bbox[2:]) > 0 and (angle := _angle(entry)):
            bbox = _around(bbox, angle)
            findings.add(Rule.ROTATED_BOX, f"{where} ({angle:g} degrees)")
        if area is None:  # users' own data often has neither area nor iscrowd
            area = float(bbox[2] * bbox[3])
        kept = {"id": own, "category_id": category, "bbox": bbox, "area": area, "iscrowd": int(crowd)}
        mask = entry.get("segmentation")
        masked = isinstance(mask, dict) and "counts" in mask and "size" in mask
        if crowd and isinstance(mask, dict):
            kept["segmentation"] = mask
        try:
            self._text += _encode(kept).encode()
        except ValueError:
            self._refuse(entry, Rule.BAD_MASK, where, findings)
            return
        self._ends.append(len(self._text))
        self._ids.append(own)
        self._images.append(image)
        self._categories.append(category)
        self._boxes.extend(bbox)
        self._areas.append(area)
        self._crowd.append(int(crowd))
        self._masked.append(masked)

    def check(
        self,
        sizes: Mapping[int, tuple[int, int]],
        categories: Mapping[int, str],
        findings: Findings,
        files: Mapping[int, str] | None = None,
    ) -> frozenset[int]:
        """Add findings that need the other lists; consequences of a refused entry are not findings of their own.

        Args:
            sizes: (height, width) of each image by id, ascending.
            categories: names by id.
            findings: this method adds to them.
            files: by image id, names that findings show.

        Returns:
            The ids of categories that have a box to train on, or an annotation that is refused.
        """
        ids, images, kinds = (np.array(column, np.int64) for column in (self._ids, self._images, self._categories))
        known = np.fromiter(sizes, np.int64, len(sizes))

        def name(image: int) -> str:
            return f"image {image} ({files[image]})" if files and image in files else f"image {image}"

        def report(rule: Rule, mask: NDArray[np.bool_], more: Callable[[int], str] = lambda k: "") -> None:
            positions = np.flatnonzero(mask).tolist()
            findings.add_all(rule, positions, lambda k: f"annotation {ids[k]} of {name(images[k])}{more(k)}")

        ordered = np.sort(ids)
        findings.add_all(Rule.REPEATED_ANNOTATION, ordered[1:][ordered[1:] == ordered[:-1]].tolist(), str)
        findings.add_all(Rule.ID_ZERO, ordered[:1][ordered[:1] == 0].tolist(), lambda _: "annotation id 0")
        gone = {Rule.UNKNOWN_IMAGE: self.refused.images, Rule.UNKNOWN_CATEGORY: self.refused.categories}
        for (rule, key), (count, examples) in self._unlisted.items():
            findings.add_counted(rule, 0 if key in gone[rule] else count, examples)
        listed = np.isin(images, known)
        report(Rule.UNKNOWN_IMAGE, ~listed & ~np.isin(images, whole_ids(self.refused.images)))
        usual = np.array([*categories, *whole_ids(self.refused.categories)], np.int64)
        report(Rule.UNKNOWN_CATEGORY, listed & ~np.isin(kinds, usual), lambda k: f" (category_id {kinds[k]})")
        if not len(known):
            return frozenset(categories)
        at_image = np.minimum(np.searchsorted(known, images), len(known) - 1)
        boxes = np.array(self._boxes).reshape(-1, 4)
        extent = np.array(list(sizes.values()), np.float32)[at_image]
        trained = listed & (np.array(self._crowd) == 0)
        flat = np.any(boxes[:, 2:] <= 0, axis=1)
        _, solid = clamp_boxes(boxes.astype(np.float32), extent)
        first, last = boxes[~flat, :2], boxes[~flat, :2] + boxes[~flat, 2:]
        if len(first) and first.min() >= -SHARE and last.max() <= 1 + SHARE:
            k = int(np.argmin(flat))
            values = ", ".join(f"{value:g}" for value in boxes[k])
            findings.add(Rule.SHARES, f"annotation {ids[k]} of {name(images[k])} is {values}")
        report(Rule.NO_AREA, trained & flat)
        report(Rule.OUTSIDE, trained & ~flat & ~solid)
        far = boxes[:, :2] + boxes[:, 2:]
        crosses = np.any(boxes[:, :2] < 0, axis=1) | np.any(far > extent[:, ::-1], axis=1)
        report(Rule.CROSSES_EDGE, trained & solid & crosses)
        masked = np.array(self._masked) == 1
        report(Rule.CROWD, listed & ~trained & masked)
        report(Rule.CROWD_WITHOUT_RLE, listed & ~trained & ~masked)
        report(Rule.AREA_NOT_POSITIVE, trained & solid & (np.array(self._areas) <= 0))
        usable = trained & solid
        counts = np.bincount(at_image[usable], minlength=len(known))
        counts[np.isin(known, whole_ids(self.refused.named_images))] += 1
        findings.add_all(Rule.EMPTY_IMAGE, known[counts == 0].tolist(), name)
        used = {*kinds[usable | ~listed].tolist(), *whole_ids(self.refused.named_categories)}
        return frozenset(used)

    def records(self, sizes: Mapping[int, tuple[int, int]], limit: int | None) -> Iterator[bytes]:
        """The JSON record of each image in the order of `sizes`, annotations by ascending id, up to `limit` images."""
        images = np.array(self._images)
        order = np.lexsort((np.array(self._ids), images))
        wanted = np.fromiter(sizes, np.int64, len(sizes))[:limit]
        first = np.searchsorted(images[order], wanted, "left").tolist()
        last = np.searchsorted(images[order], wanted, "right").tolist()
        for image, start, stop in zip(wanted.tolist(), first, last, strict=True):
            height, width = sizes[image]
            parts = (self._text[self._ends[k] : self._ends[k + 1]] for k in order[start:stop].tolist())
            tail = f'],"height":{height},"image_id":{image},"width":{width}}}'
            yield b'{"annotations":[' + b",".join(parts) + tail.encode()

    def _refuse(self, entry: Any, rule: Rule, example: str, findings: Findings) -> None:
        findings.add(rule, example)
        self.refused.add_annotation(entry)

    def _refuse_unlisted(self, entry: Any, rule: Rule, value: Any, example: str) -> None:
        """Record an id that is not valid; `check` decides whether it is a consequence of a refused entry."""
        count, examples = self._unlisted.get((rule, id_key(value)), (0, []))
        self._unlisted[rule, id_key(value)] = (count + 1, [*examples, example][:SHOWN])
        self.refused.add_annotation(entry)


def _unquote(value: Any) -> Any:
    """Convert a number in quotes to a number; return anything else unchanged."""
    if isinstance(value, str) and len(value) <= MAX_NUMBER_CHARACTERS and NUMBER.fullmatch(text := value.strip()):
        return float(text) if set(text) & set(".eE") else int(text)
    return value


def _angle(entry: Mapping[str, Any]) -> float:
    """Degrees by which CVAT's boxes are rotated around their centre; 0 for others, and for boxes around a polygon."""
    attributes = entry.get("attributes")
    angle: Any = _unquote(attributes.get("rotation")) if isinstance(attributes, dict) else None
    return angle % 360 if _is_number(angle) and not entry.get("segmentation") else 0.0


def _around(bbox: list[float], angle: float) -> list[float]:
    """The box around a rotated box, both as x, y, width, height."""
    x, y, width, height = bbox
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    w, h = width * cos + height * sin, width * sin + height * cos
    return [round(value, 3) for value in (x + (width - w) / 2, y + (height - h) / 2, w, h)]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_NUMBER <= value <= MAX_NUMBER  # NaN fails both comparisons
