"""What a backend of COCO AP gets and returns: an evaluation as columns, and the arrays of pycocotools' `COCOeval.eval`.

Images and categories are numbered from 1 in ascending order of their ids, so that ids of any size and with holes reach
no backend. Objects and detections are sorted by image; within an image their order is part of the input, because it
decides ties. Boxes, areas and scores are float64 and finite. Never fails.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LIMITS = (1, 10, 100)  # detections per image and category; the published AP is at the last one
SIZES = ("all", "small", "medium", "large")  # the A axis
IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)  # the T axis, with the bits of pycocotools
RECALL_THRESHOLDS: Floats = np.linspace(0.0, 1.0, 101)  # the R axis


@dataclass(frozen=True)
class Objects:
    """G objects of the ground truth."""

    images: Ints  # [G] from 1
    categories: Ints  # [G] from 1
    boxes_xywh: Floats  # [G, 4] pixels
    areas: Floats  # [G] as annotated; decides the size class
    crowds: NDArray[np.bool_]  # [G] region of many objects, where detections are ignored

    def annotations(self) -> list[dict[str, Any]]:
        """COCO's annotations with ids from 1, because pycocotools treats id 0 as "unmatched", which lowers AP."""
        columns = (self.images, self.categories, self.boxes_xywh, self.areas, self.crowds.astype(np.int64))
        return [
            {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for number, (image, category, box, area, crowd) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True), start=1
            )
        ]


@dataclass(frozen=True)
class Found:
    """D detections."""

    images: Ints  # [D] from 1
    categories: Ints  # [D] from 1
    boxes_xywh: Floats  # [D, 4] pixels
    scores: Floats  # [D]

    def rows(self) -> Floats:
        """[D, 7] image, x, y, width, height, score, category, as `loadRes` of pycocotools takes an array."""
        rows = np.empty((len(self.images), 7))
        rows[:, 0], rows[:, 1:5], rows[:, 5], rows[:, 6] = self.images, self.boxes_xywh, self.scores, self.categories
        return rows

    def annotations(self) -> list[dict[str, Any]]:
        """COCO's results as `loadRes` of pycocotools completes them."""
        areas = self.boxes_xywh[:, 2] * self.boxes_xywh[:, 3]
        objects = Objects(self.images, self.categories, self.boxes_xywh, areas, np.zeros(len(areas), np.bool_))
        scores = self.scores.tolist()
        return [entry | {"score": score} for entry, score in zip(objects.annotations(), scores, strict=True)]


@dataclass(frozen=True)
class Task:
    """One evaluation."""

    images: int  # images are 1 .. images; those without objects and detections count, too
    categories: int
    objects: Objects
    found: Found
    limits: tuple[int, ...] = LIMITS  # ascending; the M axis


@dataclass(frozen=True)
class Arrays:
    """Result of a backend: K categories, A SIZES, M limits; -1 where the ground truth has no object."""

    precision: Floats  # [T, R, K, A, M]
    recall: Floats  # [T, K, A, M] highest recall
    scores: Floats  # [T, R, K, A, M] score at which the recall is reached

    def differences(self, other: "Arrays") -> list[str]:
        """The names of the arrays of which not every bit is the same."""
        return [name for name in ("precision", "recall", "scores") if _bits(self, name) != _bits(other, name)]


def _bits(arrays: Arrays, name: str) -> tuple[tuple[int, ...], bytes]:
    array: Floats = getattr(arrays, name)
    return array.shape, array.tobytes()


class Backend(Protocol):
    """An implementation of COCO's evaluation of boxes."""

    @property
    def package(self) -> str:
        """Name of the distribution on PyPI."""

    def run(self, task: Task) -> Arrays:
        """Match detections with objects, and accumulate."""
