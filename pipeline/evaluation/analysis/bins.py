"""AP of objects of similar sizes and shapes. Never fails.

As in pycocotools, an object outside of the range is ignored, and so is an unmatched detection outside of it. Both ends
belong to a range.
"""

from itertools import pairwise

import numpy as np

from pipeline.evaluation.analysis.curves import Accumulator, by_area, outside
from pipeline.evaluation.analysis.result import Bin
from pipeline.evaluation.analysis.table import Flags, Table
from pipeline.evaluation.backends.base import Floats
from pipeline.evaluation.coco import mean_known

SIDES = (0.0, 8.0, 16.0, 32.0, 64.0, 96.0, 128.0, 256.0, 512.0, None)  # pixels; 32 and 96 are COCO's limits
LARGEST = 1e5  # pixels, pycocotools' limit of "all"
RATIOS = (0.0, 1 / 4, 1 / 2, 3 / 4, 4 / 3, 2.0, 4.0, None)  # width / height


def size_bins(table: Table) -> tuple[Bin, ...]:
    """By the square root of the area."""
    return tuple(
        _bin(table, low or 0.0, high, *by_area(table, low or 0.0, high or LARGEST)) for low, high in pairwise(SIDES)
    )


def aspect_bins(table: Table) -> tuple[Bin, ...]:
    """By width / height of the box."""
    ours, theirs = _ratios(table.objects.boxes), _ratios(table.found.boxes)
    bins = []
    for low, high in pairwise(RATIOS):
        limits = (low or 0.0, np.inf if high is None else high)
        bins.append(_bin(table, limits[0], high, outside(ours, *limits), outside(theirs, *limits)))
    return tuple(bins)


def _ratios(boxes: Floats) -> Floats:
    """Infinite for boxes without height, 1 for those without width and height."""
    width, height = boxes[:, 2], boxes[:, 3]
    flat = np.where(width > 0, np.inf, 1.0)
    ratios: Floats = np.divide(width, height, out=flat, where=height > 0)
    return ratios


def _bin(table: Table, low: float, high: float | None, out: Flags, found_out: Flags) -> Bin:
    curve = Accumulator(table, out, found_out).curve()
    objects = int(np.count_nonzero(~out & ~table.objects.crowd))
    return Bin(
        low, high, objects, mean_known(curve.precision), mean_known(curve.precision[[0]]), mean_known(curve.recall)
    )
