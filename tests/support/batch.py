"""A small pad group."""

import numpy as np

from pipeline.data.batch import Batch, Item, collate
from support.data import noise_image

SIZES = ((40, 60), (64, 32), (50, 50))


def batch() -> Batch:
    boxes = [[[0, 0, 30, 20], [30, 20, 60, 40]], [], [[10, 20, 30, 45]]]
    items = [
        Item(
            noise_image(size, k),
            np.array(boxes[k], np.float32).reshape(-1, 4),
            np.arange(len(boxes[k])) + 5,
            100 + k,
            (480, 640 + k),
        )
        for k, size in enumerate(SIZES)
    ]
    return collate(items, group=3, weight=0.0)
