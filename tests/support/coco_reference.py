"""pycocotools as its documentation calls it, on COCO's dictionaries as they are: what every backend must equal."""

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.evaluation.backends.base import LIMITS, Arrays
from pipeline.evaluation.detections import Detections


def reference(
    tree: dict[str, Any],
    results: list[dict[str, Any]],
    images: list[int] | None = None,
    limits: Sequence[int] = LIMITS,
    sides: Sequence[tuple[float, float]] | None = None,
) -> tuple[list[float], Arrays]:
    """The 12 numbers and the arrays; with `sides`, those of objects of these square roots of areas, and no numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO()
        annotations.dataset = copy.deepcopy(tree)
        annotations.createIndex()
        if results:
            found = annotations.loadRes(copy.deepcopy(results))
        else:  # loadRes cannot read an empty list
            found = COCO()
            found.dataset = {**tree, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(annotations, found, "bbox")
        evaluation.params.imgIds = images or evaluation.params.imgIds
        evaluation.params.maxDets = list(limits)
        if sides is not None:
            evaluation.params.areaRng = [[low**2, high**2] for low, high in sides]
            evaluation.params.areaRngLbl = [str(number) for number in range(len(sides))]
        evaluation.evaluate()
        evaluation.accumulate()
        if sides is None:
            evaluation.summarize()
    eval_ = evaluation.eval
    return list(map(float, evaluation.stats)), Arrays(eval_["precision"], eval_["recall"], eval_["scores"])


def perfect(truth: dict[str, Any]) -> Detections:
    """Every object that is no crowd, with score 1."""
    kept = [a for a in truth["annotations"] if not a["iscrowd"]]
    rows = np.arange(len(kept))
    return Detections(
        np.array([a["image_id"] for a in kept], np.int64),
        rows.astype(np.int32),
        np.array([a["category_id"] for a in kept], np.int64),
        np.array([a["bbox"] for a in kept], np.float64).reshape(-1, 4),
        np.ones(len(kept)),
    )


def imperfect(truth: dict[str, Any], per_image: int, seed: int) -> Detections:
    """Detections as of a poor model: shifted, repeated and invented boxes, wrong categories, equal scores."""
    rng = np.random.default_rng(seed)
    images = np.repeat([image["id"] for image in truth["images"]], per_image)
    categories = rng.choice([category["id"] for category in truth["categories"]], len(images))
    boxes = rng.uniform(0, 400, (len(images), 4))
    own: dict[int, list[dict[str, Any]]] = {}
    for annotation in truth["annotations"]:
        own.setdefault(annotation["image_id"], []).append(annotation)
    for row, image in enumerate(images.tolist()):
        if image in own and rng.random() < 0.8:
            chosen = own[image][rng.integers(len(own[image]))]
            boxes[row] = np.array(chosen["bbox"]) * rng.uniform(0.85, 1.15, 4)
            categories[row] = chosen["category_id"] if rng.random() < 0.8 else categories[row]
    scores = rng.choice([0.2, 0.4, rng.random()], len(images)) * rng.choice([1.0, rng.random()], len(images))
    orders = np.tile(np.arange(per_image, dtype=np.int32), len(truth["images"]))
    return Detections(images, orders, categories, boxes.astype(np.float32), scores.astype(np.float32))
