"""Which detection is assigned to which object: pycocotools' greedy matching, over all images and categories at once.

The best detections of all images and categories choose first, then all second ones, and so on. So a step of numpy
handles one detection of every image and category. Never fails.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.analysis.table import Flags, Table
from pipeline.evaluation.backends.base import IOU_THRESHOLDS, Floats, Ints


@dataclass(frozen=True)
class Matches:
    """The objects of M detections at T thresholds; every other detection of the table is unmatched at all of them."""

    found: Ints  # [M] rows of detections, ascending
    objects: NDArray[np.int32]  # [T, M] row of the object, -1 = unmatched


def match(table: Table, ignored: Flags, ious: Floats = IOU_THRESHOLDS) -> Matches:
    """Match as `COCOeval.evaluateImg` does.

    A detection takes the object of its category with the largest IoU that no better detection has, and the last one of
    equals. It takes an ignored object only if there is no other. A crowd region can be taken any number of times.

    Args:
        table: detections and objects.
        ignored: [G] objects that do not count; crowd regions must be among them.
        ious: [T] lowest IoUs of a match, each at least BACKGROUND_IOU.
    """
    lowest = np.minimum(ious, 1 - 1e-10)  # as in pycocotools
    pairs = table.pairs
    same = table.found.categories[pairs.found] == table.objects.categories[pairs.objects]
    pairs = pairs[same & (pairs.ious >= lowest.min(initial=1.0))]
    # A pair's position decides: by IoU, then by the order of objects. Ignored objects come below all others.
    pairs = pairs[np.lexsort((pairs.objects, pairs.ious, pairs.found))]
    keys = np.arange(len(pairs.found)) + np.where(ignored[pairs.objects], 0, len(pairs.found))
    found, starts = np.unique(pairs.found, return_index=True)
    objects = np.full((len(ious), len(found)), -1, np.int32)
    taken = np.zeros((len(ious), len(table.objects)), np.bool_)
    enough = pairs.ious >= lowest[:, None]  # [T, P]
    ends = np.append(starts, len(pairs.found))[1:]
    ranks = table.found.ranks[found]
    for columns in np.split(np.argsort(ranks, kind="stable"), np.flatnonzero(np.diff(np.sort(ranks))) + 1):
        if not len(columns):
            continue
        lengths = ends[columns] - starts[columns]
        firsts = np.cumsum(lengths) - lengths
        rows = np.arange(lengths.sum()) + np.repeat(starts[columns] - firsts, lengths)
        free = enough[:, rows] & (~taken[:, pairs.objects[rows]] | table.objects.crowd[pairs.objects[rows]])
        best = np.maximum.reduceat(np.where(free, keys[rows], -1), firsts, axis=1)  # [T, columns]
        chosen = np.where(best >= 0, pairs.objects[best % len(pairs.found)], -1)
        objects[:, columns] = chosen
        threshold, column = np.nonzero(chosen >= 0)
        taken[threshold, chosen[threshold, column]] = True
    return Matches(found, objects)
