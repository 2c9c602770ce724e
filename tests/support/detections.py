"""Detections that are made from the ground truth, with planted errors."""

from collections import Counter
from typing import Any

import numpy as np

from pipeline.evaluation.detections import Detections


def planted_detections(truth: dict[str, Any], seed: int = 0, found: float = 0.8) -> Detections:
    """A detection of `found` of all objects, some of them of a wrong class or in a wrong place, in float32."""
    random = np.random.default_rng(seed)
    ids = [category["id"] for category in truth["categories"]]
    rows = [a for a in truth["annotations"] if not a.get("iscrowd") and random.random() < found]
    count = len(rows)
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    boxes[:, :2] += random.normal(0, 0.15, (count, 2)) * boxes[:, 2:] * (random.random((count, 1)) < 0.5)
    categories = [row["category_id"] if random.random() < 0.8 else int(random.choice(ids)) for row in rows]
    seen: Counter[int] = Counter()
    orders = np.zeros(count, np.int32)
    for place, row in enumerate(rows):
        orders[place] = seen[row["image_id"]]
        seen[row["image_id"]] += 1
    return Detections(
        np.array([row["image_id"] for row in rows], np.int64),
        orders,
        np.array(categories, np.int64),
        boxes.astype(np.float32),
        random.uniform(0.05, 1, count).astype(np.float32),
    )
