"""Drawn ground truth with detections, and short ways to write both."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.detections import Detections, concatenate

Row = tuple[int, int, Sequence[float], float]  # image id, category id, box xywh, score


def detections_of(rows: Sequence[Row]) -> Detections:
    """Detections in the order of `rows`."""
    if not rows:
        return concatenate([])
    images, categories, boxes, scores = zip(*rows, strict=True)
    orders = np.arange(len(rows), dtype=np.int32)
    return Detections(np.array(images), orders, np.array(categories), np.array(boxes, np.float64), np.array(scores))


def draw_set(seed: int, images: int = 30, categories: int = 4, ties: bool = False) -> tuple[dict[str, Any], Detections]:
    """Ground truth with crowd regions, empty images, an empty category and holes in the ids, and faulty detections.

    Args:
        seed: of everything.
        images: their number.
        categories: their number; the last one has no object.
        ties: a fifth of the scores only, so that many are equal; otherwise no two are.
    """
    random = np.random.default_rng(seed)
    ids = (7 * np.arange(images) + 3).tolist()
    classes = (10 * np.arange(categories) + 1).tolist()
    annotations, rows = [], []
    scores = iter(random.permutation(images * 50) / (images * 50))
    for image in ids:
        for _ in range(random.integers(0, 8)):
            box = [*random.uniform(0, 300, 2), *np.exp(random.uniform(1, 5.5, 2))]
            category = int(random.choice(classes[:-1]))
            crowd = int(random.random() < 0.1)
            area = box[2] * box[3] * random.choice([1.0, 0.6])  # as of a mask
            annotations.append(
                {"image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            )
            for _ in range(random.integers(0, 4)):
                shift = random.choice([0.0, 0.03, 0.1, 0.3])
                changed = np.array(box) * np.exp(random.normal(0, shift, 4))
                found = category if random.random() < 0.7 else int(random.choice(classes))
                rows.append((image, found, changed.tolist(), next(scores)))
        for _ in range(random.integers(0, 4)):
            box = [*random.uniform(0, 300, 2), *np.exp(random.uniform(1, 5.5, 2))]
            rows.append((image, int(random.choice(classes)), box, next(scores)))
    if ties:
        rows = [(image, category, box, round(5 * score) / 5) for image, category, box, score in rows]
    return _tree(ids, annotations, classes), detections_of(rows)


def truth_of(objects: Sequence[tuple[int, int, Sequence[float]]], images: int, categories: int) -> dict[str, Any]:
    """Ground truth with image ids from 1 and category ids from 1; `objects` as (image id, category id, xywh)."""
    annotations = [
        {"image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        for image, category, box in objects
    ]
    return _tree(list(range(1, images + 1)), annotations, list(range(1, categories + 1)))


def _tree(images: list[int], annotations: list[dict[str, Any]], categories: list[int]) -> dict[str, Any]:
    return {
        "images": [{"id": image} for image in images],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)],
        "categories": [{"id": category, "name": f"class {category}"} for category in categories],
    }
