"""The 12 COCO numbers by pycocotools, the reference: none of its arithmetic is repeated or changed here.

This module adds what pycocotools lacks. An empty result is AP 0, detections are checked, the images are restricted
explicitly, and nothing is printed. As in pycocotools, a number is -1 if the ground truth has no object of its size
class. Raises AnnotationError, ShardError and DetectionError.
"""

import contextlib
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.data.dataset import DetectionDataset
from pipeline.data.index import Category
from pipeline.data.sharding.annotations import read_coco
from pipeline.evaluation.detections import Detections

METRICS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


@dataclass(frozen=True)
class Scores:
    """One evaluation by pycocotools."""

    metrics: dict[str, float]  # by METRICS
    recalls: NDArray[np.float64]  # [R] the 101 recall thresholds
    precision: NDArray[np.float64]  # [T, R, K] at 10 IoU thresholds, all sizes, top 100; -1 = no object
    category_ids: tuple[int, ...]  # [K]


def coco_ap(
    ground_truth: dict[str, Any], detections: Detections, image_ids: Collection[int] | None = None
) -> dict[str, float]:
    """The METRICS of `coco_scores`, with its arguments and errors."""
    return coco_scores(ground_truth, detections, image_ids).metrics


def coco_scores(
    ground_truth: dict[str, Any], detections: Detections, image_ids: Collection[int] | None = None
) -> Scores:
    """Box AP and AR over the top 100 detections of each image and category.

    Args:
        ground_truth: COCO's `images` (id), `annotations` (image_id, category_id, bbox xywh, area, iscrowd) and
            `categories` (id). The ids of annotations are replaced by numbers from 1, because pycocotools treats id 0
            as "unmatched", which lowers AP.
        detections: in any order of images; within an image, `orders` decides ties.
        image_ids: the images that were evaluated, if not all of them; those without detections count as missed.

    Returns:
        Metrics and precision, bit-equal to pycocotools on the same numbers.

    Raises:
        DetectionError: see `Detections.check_and_sort`.
    """
    images = sorted(image["id"] for image in ground_truth["images"]) if image_ids is None else sorted(image_ids)
    categories = [category["id"] for category in ground_truth["categories"]]
    results = detections.check_and_sort(images, categories).to_results()
    for result in results:
        result |= {"area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
    # pycocotools prints to standard output. The redirection affects the whole process while it runs.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(ground_truth, ground_truth["annotations"]), _index(ground_truth, results), "bbox")
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = dict(zip(METRICS, map(float, evaluation.stats), strict=True))
    precision = evaluation.eval["precision"][..., 0, -1]  # [T, R, K, sizes, limits] at all sizes, the largest limit
    return Scores(metrics, evaluation.params.recThrs, precision, tuple(evaluation.params.catIds))


def _index(ground_truth: dict[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    """A COCO object over numbered copies, because pycocotools writes into its arguments."""
    coco = COCO()
    numbered = [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)]
    coco.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": numbered,
    }
    coco.createIndex()
    return coco


def ground_truth(shards: DetectionDataset | str) -> dict[str, Any]:
    """Ground truth of a shard folder, crowd regions included. Raises ShardError."""
    data = DetectionDataset(shards) if isinstance(shards, str) else shards
    found = [(record["image_id"], record["annotations"]) for record in map(data.read_annotations, range(len(data)))]
    return _tree(found, data.index.categories)


def ground_truth_of_file(path: Path) -> dict[str, Any]:
    """Ground truth of a COCO annotation file. Raises AnnotationError."""
    source = read_coco(path)
    return _tree([(image.id, image.annotations) for image in source.images], source.categories)


def _tree(found: Sequence[tuple[int, Iterable[dict[str, Any]]]], categories: tuple[Category, ...]) -> dict[str, Any]:
    return {
        "images": [{"id": image} for image, _ in found],
        "annotations": [{**annotation, "image_id": image} for image, some in found for annotation in some],
        "categories": [{"id": category.id, "name": category.name} for category in categories],
    }
