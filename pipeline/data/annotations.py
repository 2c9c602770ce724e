"""Reading a COCO annotation file (`instances_*.json`, or one's own in the same form) and checking all of it.

Used by `shards.build_shards`. Everything that would otherwise fail in the middle of a build or a training run is an
`AnnotationError` here, with how many there are and the first few. Polygons are dropped while parsing (training and box
AP need none, and they are most of the file); the RLE of crowd regions is kept.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipeline.data.index import Category
from pipeline.errors import AnnotationError

SHOWN = 5  # examples per message
MAX_IMAGE_ID = 10**12 - 1  # member names have 12 digits


@dataclass(frozen=True)
class CocoImage:
    """One image entry and its annotations: dicts of id, category_id, bbox (xywh), area, iscrowd, crowd segmentation."""

    id: int
    file_name: str
    width: int
    height: int
    annotations: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CocoSource:
    """A checked annotation file: categories and images in ascending order of id."""

    digest: str  # sha256 of the file
    categories: tuple[Category, ...]
    images: tuple[CocoImage, ...]


def read_coco(path: Path, limit: int | None = None) -> CocoSource:
    """Read and check the file; `limit` keeps the first images by id.

    Raises:
        AnnotationError: not readable, not COCO JSON, no images, ids twice, unknown images or categories, bad boxes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"cannot read annotations {path}: {error.strerror}") from None
    try:
        document = json.loads(data, object_hook=_drop_polygons)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is not JSON: {error}") from None
    try:
        return _parse(path, document, hashlib.sha256(data).hexdigest(), limit)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise AnnotationError(f"{path} is not a COCO annotation file: {type(error).__name__} {error}") from None


def usable_boxes(annotations: Iterable[dict[str, Any]], size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """Boxes that training uses: crowd dropped, clamped to the image, those without area dropped (published recipe).

    Args:
        annotations: dicts with bbox (xywh, pixels), iscrowd and category_id.
        size: (height, width) of the image.

    Returns:
        float32 boxes_xyxy [n, 4] in pixels, and their category ids.
    """
    kept = [annotation for annotation in annotations if not annotation["iscrowd"]]
    boxes = np.array([annotation["bbox"] for annotation in kept], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    height, width = size
    np.clip(boxes, 0, np.array([width, height, width, height], np.float32), out=boxes)
    solid = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    return boxes[solid], [kept[i]["category_id"] for i in np.flatnonzero(solid)]


def _drop_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    if "segmentation" in entry and not (entry.get("iscrowd") and isinstance(entry["segmentation"], dict)):
        del entry["segmentation"]
    return entry


def _parse(path: Path, document: Any, digest: str, limit: int | None) -> CocoSource:
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(_get(document, key), list)]
    if missing:
        raise AnnotationError(f"{path} is not a COCO annotation file: it has no list of {', '.join(missing)}")
    if not document["images"]:
        raise AnnotationError(f"{path} lists no images; there is nothing to shard")
    if not document["categories"]:
        raise AnnotationError(f"{path} lists no categories; a detector needs at least one")
    categories = tuple(sorted((Category(_id(c), str(c["name"])) for c in document["categories"]), key=lambda c: c.id))
    images = sorted(document["images"], key=_id)
    for kind, entries in (("category", document["categories"]), ("image", images)):
        _refuse_repeats(path, kind, [_id(entry) for entry in entries])
    _refuse_repeats(path, "annotation", [_id(entry) for entry in document["annotations"]])
    if images[-1]["id"] > MAX_IMAGE_ID:
        raise AnnotationError(f"{path}: image id {images[-1]['id']} has more than 12 digits; renumber the images")
    known = {image["id"] for image in images}
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    faults: list[str] = []
    category_ids = {category.id for category in categories}
    for entry in document["annotations"]:
        fault = _fault(entry, known, category_ids)
        if fault:
            faults.append(f"annotation {entry['id']} {fault}")
        else:
            grouped[entry["image_id"]].append(_keep(entry))
    if faults:
        raise AnnotationError(f"{path}: {summarize(faults, 'faulty annotation')}; mend or remove them")
    kept = images if limit is None else images[:limit]
    return CocoSource(digest, categories, tuple(_image(path, image, grouped[image["id"]]) for image in kept))


def summarize(faults: list[str], what: str) -> str:
    """`3 faulty annotations: a; b; c ...` with at most SHOWN examples."""
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return f"{len(faults)} {what}{'' if len(faults) == 1 else 's'}: {'; '.join(faults[:SHOWN])}{more}"


def _get(document: Any, key: str) -> Any:
    return document.get(key) if isinstance(document, dict) else None


def _id(entry: dict[str, Any]) -> int:
    value = entry["id"]
    if type(value) is not int or value < 0:
        raise ValueError(f"id {value!r} must be a whole number of at least 0")
    return value


def _refuse_repeats(path: Path, kind: str, ids: list[int]) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[int] = set()
    repeats = [str(i) for i in ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]  # add returns None
    raise AnnotationError(f"{path}: ids must be unique; {summarize(repeats, f'repeated {kind} id')}")


def _fault(entry: dict[str, Any], images: set[int], categories: set[int]) -> str | None:
    if entry["image_id"] not in images:
        return f"is for image {entry['image_id']}, which is not listed"
    if entry["category_id"] not in categories:
        return f"(image {entry['image_id']}) has category {entry['category_id']}, which does not exist"
    bbox = entry["bbox"]
    if len(bbox) != 4 or not all(isinstance(x, int | float) and math.isfinite(x) for x in bbox):
        return f"(image {entry['image_id']}) has bbox {bbox}, not four finite numbers x, y, width, height"
    return None


def _keep(entry: dict[str, Any]) -> dict[str, Any]:
    area = float(entry.get("area", entry["bbox"][2] * entry["bbox"][3]))  # one's own data often has neither of these
    if not math.isfinite(area):
        raise ValueError(f"annotation {entry['id']} has area {area}")
    kept = {name: entry[name] for name in ("id", "category_id", "bbox")}
    kept |= {"area": entry.get("area", area), "iscrowd": int(entry.get("iscrowd", 0))}
    return kept | ({"segmentation": entry["segmentation"]} if "segmentation" in entry else {})


def _image(path: Path, entry: dict[str, Any], annotations: list[dict[str, Any]]) -> CocoImage:
    name, width, height = entry["file_name"], entry["width"], entry["height"]
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise AnnotationError(f"{path}: image {entry['id']} has file_name {name!r}, which leaves the image folder")
    if type(width) is not int or type(height) is not int or width < 1 or height < 1:
        raise AnnotationError(
            f"{path}: image {entry['id']} has size {width!r} x {height!r}, not positive whole numbers"
        )
    return CocoImage(entry["id"], name, width, height, tuple(sorted(annotations, key=_id)))
