"""The 12 COCO numbers: detections are checked, numbered, scored by a backend and summarised as pycocotools does.

pycocotools is the reference. `evaluation.backend` chooses who computes its arrays; the backends offered there give the
same bits, which `tests/evaluation/backends/` proves. This module adds what pycocotools lacks: an empty result is
AP 0, detections are checked, and the images are restricted explicitly. As in pycocotools, a number is -1 if the ground
truth has no object of its size class. Raises AnnotationError, ShardError, DetectionError and ConfigError.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import ApBackend
from pipeline.data.dataset import DetectionDataset
from pipeline.data.index import Category
from pipeline.data.sharding.annotations import read_coco
from pipeline.errors import AnnotationError
from pipeline.evaluation.backends.base import (
    LIMITS,
    RECALL_THRESHOLDS,
    Arrays,
    Backend,
    Floats,
    Found,
    Ints,
    Objects,
    Task,
)
from pipeline.evaluation.backends.select import load_backend
from pipeline.evaluation.detections import Detections, find_places
from pipeline.evaluation.summary import METRICS as METRICS
from pipeline.evaluation.summary import mean_known as mean_known
from pipeline.evaluation.summary import summarise as summarise
from pipeline.logs import get_logger

log = get_logger("coco")


@dataclass(frozen=True)
class Scores:
    """One evaluation."""

    metrics: dict[str, float]  # by METRICS
    arrays: Arrays  # at all SIZES and at the limits of `task`
    category_ids: tuple[int, ...]  # [K]
    task: Task  # what was scored
    backend: str  # the package that computed the arrays

    @property
    def recalls(self) -> Floats:
        """[R] the 101 recall thresholds."""
        return RECALL_THRESHOLDS

    @property
    def precision(self) -> Floats:
        """[T, R, K] at 10 IoU thresholds, all sizes, top 100; -1 = no object."""
        return self.arrays.precision[..., 0, LIMITS.index(100)]

    @property
    def recall(self) -> Floats:
        """[T, K] highest recall at 10 IoU thresholds, all sizes, top 100; -1 = no object."""
        return self.arrays.recall[..., 0, LIMITS.index(100)]

    @property
    def scores(self) -> Floats:
        """[T, R, K] the score at which `precision` is reached, of all sizes, top 100."""
        return self.arrays.scores[..., 0, LIMITS.index(100)]


def coco_ap(
    ground_truth: dict[str, Any], detections: Detections, image_ids: Collection[int] | None = None
) -> dict[str, float]:
    """The METRICS of `coco_scores`, with its arguments and errors."""
    return coco_scores(ground_truth, detections, image_ids).metrics


def coco_scores(
    ground_truth: dict[str, Any],
    detections: Detections,
    image_ids: Collection[int] | None = None,
    backend: ApBackend = "auto",
    limit: int = 100,
) -> Scores:
    """Box AP and AR over the top 100 detections of each image and category.

    Args:
        ground_truth: COCO's `images` (id), `annotations` (image_id, category_id, bbox xywh, area, iscrowd) and
            `categories` (id).
        detections: in any order of images; within an image, `orders` decides ties.
        image_ids: the images that were evaluated, if not all of them; those without detections count as missed.
        backend: who computes; the bits are the same.
        limit: above 100, the arrays have one more limit, for `summarise`; the METRICS stay at 100.

    Returns:
        Metrics and arrays, bit-equal to pycocotools on the same numbers.

    Raises:
        DetectionError: see `Detections.check_and_sort`.
        AnnotationError: a box or area of the ground truth is not finite.
        ConfigError: the backend is not installed.
    """
    limits = (*LIMITS, limit) if limit > LIMITS[-1] else LIMITS
    task, _, categories = build_task(ground_truth, detections, image_ids, limits)
    arrays, used = _run(load_backend(backend), task)
    return Scores(summarise(arrays), arrays, tuple(categories.tolist()), task, used)


def build_task(
    ground_truth: dict[str, Any],
    detections: Detections,
    image_ids: Collection[int] | None = None,
    limits: tuple[int, ...] = LIMITS,
) -> tuple[Task, Ints, Ints]:
    """An evaluation as columns, and the ascending ids of its images and categories; arguments as in `coco_scores`."""
    known = [image["id"] for image in ground_truth["images"]] if image_ids is None else image_ids
    images = np.unique(np.fromiter(known, np.int64))
    categories = np.unique(np.array([category["id"] for category in ground_truth["categories"]], np.int64))
    found = detections.check_and_sort(images, categories)
    task = Task(
        images=len(images),
        categories=len(categories),
        objects=_objects(ground_truth["annotations"], images, categories),
        found=Found(
            find_places(found.image_ids, images) + 1,
            find_places(found.category_ids, categories) + 1,
            np.ascontiguousarray(found.boxes_xywh, np.float64),
            found.scores.astype(np.float64),
        ),
        limits=limits,
    )
    return task, images, categories


def _run(backend: Backend, task: Task) -> tuple[Arrays, str]:
    """The arrays, and the package that has computed them: pycocotools if the backend fails."""
    try:
        return backend.run(task), backend.package
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        if backend.package == "pycocotools":
            raise
        log.warning(
            "%s cannot score these detections (%r); pycocotools does, which takes longer", backend.package, error
        )
        return load_backend("pycocotools").run(task), "pycocotools"


def _objects(annotations: list[dict[str, Any]], images: Ints, categories: Ints) -> Objects:
    """The annotations of `images` and `categories` as columns, by image; within an image in their order."""
    image_ids = np.array([annotation["image_id"] for annotation in annotations], np.int64)
    category_ids = np.array([annotation["category_id"] for annotation in annotations], np.int64)
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4)
    areas = np.array([annotation["area"] for annotation in annotations], np.float64)
    crowds = np.array([annotation["iscrowd"] for annotation in annotations], np.bool_)
    faulty = ~(np.isfinite(boxes).all(1) & np.isfinite(areas))
    if faulty.any():
        raise AnnotationError(f"annotations of image {image_ids[faulty][0]} have a box or area that is not finite")
    image_places, category_places = find_places(image_ids, images), find_places(category_ids, categories)
    rows = np.argsort(image_places, kind="stable")
    rows = rows[(image_places[rows] >= 0) & (category_places[rows] >= 0)]
    return Objects(image_places[rows] + 1, category_places[rows] + 1, boxes[rows], areas[rows], crowds[rows])


def ground_truth(shards: DetectionDataset | str) -> dict[str, Any]:
    """Ground truth of a shard folder, crowd regions included. Raises ShardError."""
    data = DetectionDataset(shards) if isinstance(shards, str) else shards
    found = [(record["image_id"], record["annotations"]) for record in map(data.read_annotations, range(len(data)))]
    return _tree(found, data.index.categories)


def ground_truth_of_file(path: Path) -> dict[str, Any]:
    """Ground truth of a COCO annotation file; its images have `file_name`. Raises AnnotationError."""
    source = read_coco(path)
    tree = _tree([(image.id, image.annotations) for image in source.images], source.categories)
    tree["images"] = [{"id": image.id, "file_name": image.file_name} for image in source.images]
    return tree


def file_names(truth: dict[str, Any]) -> dict[int, str]:
    """The file name of each image by its id; empty for the ground truth of shards, which have no names."""
    return {image["id"]: image["file_name"] for image in truth["images"] if "file_name" in image}


def _tree(found: Sequence[tuple[int, Iterable[dict[str, Any]]]], categories: tuple[Category, ...]) -> dict[str, Any]:
    return {
        "images": [{"id": image} for image, _ in found],
        "annotations": [{**annotation, "image_id": image} for image, some in found for annotation in some],
        "categories": [{"id": category.id, "name": category.name} for category in categories],
    }
