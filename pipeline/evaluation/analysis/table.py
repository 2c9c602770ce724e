"""Ground truth and detections as sorted arrays, with the overlaps of both: what every part of an analysis starts from.

Overlaps are computed by pycocotools, all categories of an image at once. Raises DetectionError for detections that
cannot be scored, and AnnotationError for a box or area of the ground truth that is not finite.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

from pipeline.evaluation.backends import base
from pipeline.evaluation.backends.base import Floats, Ints
from pipeline.evaluation.coco import build_task
from pipeline.evaluation.detections import Detections

TOP = 100  # detections of an image and category that count, as in pycocotools
CORRECT_IOU = 0.5  # of single thresholds: operating points, causes of errors, confusion, images
BACKGROUND_IOU = 0.1  # a detection that overlaps no object more than this is background; TIDE's value

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

    def __getitem__(self, rows: NDArray[Any]) -> "Found":
        """The rows that a boolean mask selects."""
        return Found(
            self.images[rows],
            self.categories[rows],
            self.boxes[rows],
            self.scores[rows],
            self.ranks[rows],
            self.image_ranks[rows],
        )

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

    def from_score(self, threshold: float) -> "Table":
        """The same with the detections of which the score is at least `threshold`; their ranks are the same."""
        kept = self.found.scores >= threshold
        rows = np.cumsum(kept) - 1
        pairs = self.pairs[kept[self.pairs.found]]
        return Table(
            self.image_ids,
            self.category_ids,
            self.names,
            self.objects,
            self.found[kept],
            Pairs(rows[pairs.found], pairs.objects, pairs.ious),
        )

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
    task, images, categories = build_task(ground_truth, detections, image_ids)
    names = {category["id"]: str(category.get("name", category["id"])) for category in ground_truth["categories"]}
    objects = Objects(
        task.objects.images - 1,
        task.objects.categories - 1,
        task.objects.boxes_xywh,
        task.objects.areas,
        task.objects.crowds,
    )
    found = _best(task.found, limit)
    return Table(
        images,
        categories,
        tuple(names[category] for category in categories.tolist()),
        objects,
        found,
        _pairs(found, objects, len(images)),
    )


def _best(found: base.Found, limit: int | None) -> Found:
    image_ranks = np.empty(len(found.images), np.int64)
    order = np.lexsort((-found.scores, found.images))
    image_ranks[order] = _ranks(found.images[order])
    order = np.lexsort((-found.scores, found.categories, found.images))
    changes = (np.diff(found.images[order], prepend=0) != 0) | (np.diff(found.categories[order], prepend=0) != 0)
    ranks = _ranks(np.cumsum(changes))
    if limit is not None:
        order, ranks = order[ranks < limit], ranks[ranks < limit]
    return Found(
        found.images[order] - 1,
        found.categories[order] - 1,
        found.boxes_xywh[order],
        found.scores[order],
        ranks,
        image_ranks[order],
    )


def _ranks(groups: Ints) -> Ints:
    """Position of each entry within its group; groups are numbered from 1, equal entries are neighbours."""
    starts = np.flatnonzero(np.diff(groups, prepend=0))
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
