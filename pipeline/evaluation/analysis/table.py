"""Ground truth and detections as sorted arrays, with the overlaps of both: what every part of an analysis starts from.

Overlaps are computed by pycocotools, all categories of an image at once. Raises DetectionError for detections that
cannot be scored.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

from pipeline.evaluation.detections import Detections

TOP = 100  # detections of an image and category that count, as in pycocotools
CORRECT_IOU = 0.5  # of single thresholds: operating points, causes of errors, confusion, images
BACKGROUND_IOU = 0.1  # a detection that overlaps no object more than this is background; TIDE's value

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Objects:
    """G objects by (image, order in the annotations), crowd regions included."""

    images: Ints  # [G] row of the image
    categories: Ints  # [G] row of the category
    boxes: Floats  # [G, 4] xywh
    areas: Floats  # [G] of the annotation, which need not be that of the box
    crowd: Flags  # [G]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Found:
    """D detections by (image, category, descending score, order): the best of each image and category."""

    images: Ints  # [D] row of the image
    categories: Ints  # [D] row of the category
    boxes: Floats  # [D, 4] xywh
    scores: Floats  # [D]
    ranks: Ints  # [D] from 0, within image and category
    image_ranks: Ints  # [D] from 0, within the image

    def __len__(self) -> int:
        return len(self.images)

    @property
    def areas(self) -> Floats:
        """[D] of the boxes."""
        areas: Floats = self.boxes[:, 2] * self.boxes[:, 3]
        return areas


@dataclass(frozen=True)
class Pairs:
    """P pairs of a detection and an object of any category in one image with an IoU of at least BACKGROUND_IOU.

    They are sorted by (detection, object). The IoU with a crowd region is the share of the detection that it covers.
    """

    found: Ints  # [P] row in Found
    objects: Ints  # [P] row in Objects
    ious: Floats  # [P]

    def __getitem__(self, rows: NDArray[Any]) -> "Pairs":
        """The rows that an index array or a boolean mask selects."""
        return Pairs(self.found[rows], self.objects[rows], self.ious[rows])


@dataclass(frozen=True)
class Table:
    """One set of detections and its ground truth. A row of an image or category is its position in the ids here."""

    image_ids: Ints  # [I] ascending
    category_ids: Ints  # [K] ascending, as in pycocotools
    names: tuple[str, ...]  # [K]
    objects: Objects
    found: Found
    pairs: Pairs

    @cached_property
    def by_score(self) -> Ints:
        """[D] detections by (category, descending score), ties in the order of images, as in pycocotools."""
        order: Ints = np.lexsort((-self.found.scores, self.found.categories))
        return order

    def positives(self, ignored: Flags, weights: Ints | None = None) -> Ints:
        """[K] objects of each category that are not `ignored` [G], each image counted `weights` [I] times."""
        kept = ~ignored
        times = None if weights is None else weights[self.objects.images[kept]]
        counts = np.bincount(self.objects.categories[kept], times, len(self.category_ids))
        return counts.astype(np.int64)


def build_table(
    ground_truth: dict[str, Any],
    detections: Detections,
    image_ids: Collection[int] | None = None,
    limit: int | None = TOP,
) -> Table:
    """Sort and overlap ground truth and detections; errors as those of `coco.coco_scores`.

    Args:
        ground_truth: as for `coco.coco_scores`.
        detections: as for `coco.coco_scores`.
        image_ids: as for `coco.coco_scores`.
        limit: most detections of an image and category, best first.
    """
    images = np.unique(
        [image["id"] for image in ground_truth["images"]] if image_ids is None else np.array(list(image_ids), np.int64)
    ).astype(np.int64)
    by_id = {category["id"]: str(category.get("name", category["id"])) for category in ground_truth["categories"]}
    categories = np.array(sorted(by_id), np.int64)
    objects = _objects(ground_truth["annotations"], images, categories)
    found = _found(detections.check_and_sort(images.tolist(), categories.tolist()), images, categories, limit)
    names = tuple(by_id[category] for category in categories.tolist())
    return Table(images, categories, names, objects, found, _pairs(found, objects, len(images)))


def _objects(annotations: list[dict[str, Any]], images: Ints, categories: Ints) -> Objects:
    known_images, known_categories = set(images.tolist()), set(categories.tolist())
    kept = [a for a in annotations if a["image_id"] in known_images and a["category_id"] in known_categories]
    rows = np.searchsorted(images, np.array([a["image_id"] for a in kept], np.int64))
    order = np.argsort(rows, kind="stable")
    return Objects(
        rows[order],
        np.searchsorted(categories, np.array([a["category_id"] for a in kept], np.int64))[order],
        np.array([a["bbox"] for a in kept], np.float64).reshape(-1, 4)[order],
        np.array([a["area"] for a in kept], np.float64)[order],
        np.array([bool(a.get("iscrowd", 0)) for a in kept], np.bool_)[order],
    )


def _found(ordered: Detections, images: Ints, categories: Ints, limit: int | None) -> Found:
    rows = np.searchsorted(images, ordered.image_ids)
    columns = np.searchsorted(categories, ordered.category_ids)
    scores = ordered.scores.astype(np.float64)
    image_ranks = np.empty(len(ordered), np.int64)
    order = np.lexsort((-scores, rows))
    image_ranks[order] = _ranks(rows[order])
    order = np.lexsort((-scores, columns, rows))
    ranks = _ranks(rows[order] * len(categories) + columns[order])
    if limit is not None:
        order, ranks = order[ranks < limit], ranks[ranks < limit]
    boxes = ordered.boxes_xywh.astype(np.float64)[order]
    return Found(rows[order], columns[order], boxes, scores[order], ranks, image_ranks[order])


def _ranks(groups: Ints) -> Ints:
    """Position of each entry within its group; equal entries are neighbours."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    positions = np.arange(len(groups))
    ranks: Ints = positions - np.repeat(starts, np.diff(starts, append=len(groups)))
    return ranks


def _pairs(found: Found, objects: Objects, images: int) -> Pairs:
    first_found = np.searchsorted(found.images, np.arange(images + 1))
    first_object = np.searchsorted(objects.images, np.arange(images + 1))
    with_both = np.flatnonzero((np.diff(first_found) > 0) & (np.diff(first_object) > 0))
    crowd = objects.crowd.astype(np.uint8)
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float64))]
    for image in with_both.tolist():
        d, g = first_found[image], first_object[image]
        its = slice(g, first_object[image + 1])
        ious = mask.iou(found.boxes[d : first_found[image + 1]], objects.boxes[its], crowd[its])
        rows, columns = np.nonzero(ious >= BACKGROUND_IOU)
        parts.append((rows + d, columns + g, ious[rows, columns]))
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))
