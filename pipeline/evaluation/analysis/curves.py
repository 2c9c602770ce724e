"""Precision over recall of images that count any number of times: pycocotools' accumulation with weights.

An image of weight 2 counts like two copies of the image that follow each other, and weight 0 like an image that is
not there. With weights of 1, every number is bit-equal to pycocotools. So it is with other weights, compared with real
copies, as long as no image has two detections of a category with the same score. Never fails.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.analysis.matching import match
from pipeline.evaluation.analysis.table import Flags, Table
from pipeline.evaluation.backends.base import IOU_THRESHOLDS, RECALL_THRESHOLDS, Floats, Ints

SPACING = np.spacing(1)  # pycocotools adds it to the number of detections


@dataclass(frozen=True)
class Curve:
    """Numbers of one range of objects at T thresholds for K categories; -1 = the category has no object."""

    precision: Floats  # [T, R, K] at RECALL_THRESHOLDS, as in pycocotools
    recall: Floats  # [T, K] of all detections
    recall_of_best: dict[int, Floats]  # [T, K] of the best 1 and 10 detections of each image and category


class Accumulator:
    """What of a table does not depend on the weights, for one range of objects.

    Only matched detections are listed by threshold. A wrong detection is one that counts and is not matched. Their
    number up to a position is that of all detections that count, minus that of the matched ones that count.
    """

    def __init__(self, table: Table, ignored: Flags, found_outside: Flags, limits: tuple[int, ...] = ()) -> None:
        """Match the detections.

        Args:
            table: detections and objects.
            ignored: [G] objects that are not in the range; crowd regions are never in it.
            found_outside: [D] detections that are not in the range; unmatched ones do not count.
            limits: numbers of detections of an image and category to compute the recall of, other than all.
        """
        self._table = table
        self._ignored = ignored | table.objects.crowd
        self._counts = ~found_outside[table.by_score]
        self._images = table.found.images[table.by_score]
        categories = len(table.category_ids)
        self._category_starts = np.searchsorted(table.found.categories[table.by_score], np.arange(categories))
        matches = match(table, self._ignored)
        position = np.empty(len(table.found), np.int64)
        position[table.by_score] = np.arange(len(position))
        columns = np.argsort(position[matches.found])  # [M] by category and score
        found = matches.found[columns]
        objects = matches.objects[:, columns]
        threshold, column = np.nonzero(objects >= 0)
        # L matched detections of all thresholds, by (threshold, category, score)
        self._found = found[column]
        self._positions = position[self._found]
        self._correct = ~self._ignored[objects[threshold, column]]
        segment = threshold * categories + table.found.categories[self._found]
        self._segments = np.searchsorted(segment, np.arange(len(IOU_THRESHOLDS) * categories + 1))
        self._hits = np.flatnonzero(self._correct)
        self._hit_segments = np.searchsorted(self._hits, self._segments)
        self._hit_segment = segment[self._hits]
        self._limits = {limit: self._correct & (table.found.ranks[self._found] < limit) for limit in limits}

    def curve(self, weights: Ints | None = None) -> Curve:
        """Precision and recall if image i counts `weights[i]` times; without `weights`, once each."""
        table = self._table
        times = np.ones(len(table.image_ids), np.int64) if weights is None else weights
        positives = table.positives(self._ignored, times)
        own = times[table.found.images[self._found]]
        correct = _running(own * self._correct)
        matched = _running(own * self._counts[self._positions])
        counted = _running(times[self._images] * self._counts)
        hits, segment, places = self._hits, self._hit_segment, self._positions[self._hits]
        starts = self._category_starts[segment % max(1, len(positives))]
        true = correct[hits + 1] - correct[self._segments[segment]]
        false = counted[places + 1] - counted[starts] - matched[hits + 1] + matched[self._segments[segment]]
        precision = true / (false + true + SPACING)
        needed = np.tile(lowest_counts(positives), (len(IOU_THRESHOLDS), 1))
        curves = interpolate(precision, true, self._hit_segments, needed)
        by_recall = (
            curves.reshape(len(IOU_THRESHOLDS), len(positives), len(RECALL_THRESHOLDS)).transpose(0, 2, 1).copy()
        )
        by_recall[:, :, positives == 0] = -1
        best = {limit: self._recall(_running(own * flags), positives) for limit, flags in self._limits.items()}
        return Curve(by_recall, self._recall(correct, positives), best)

    def _recall(self, correct: Ints, positives: Ints) -> Floats:
        found = np.diff(correct[self._segments]).reshape(len(IOU_THRESHOLDS), -1)
        recall: Floats = np.where(positives > 0, found / np.maximum(positives, 1), -1.0)
        return recall


def lowest_counts(positives: Ints) -> Ints:
    """[K, R] how many of the `positives` [K] must be found for each of RECALL_THRESHOLDS; at least 1.

    It is the smallest count whose recall, as a float, is not below the threshold, which is what `searchsorted` finds.
    """
    total = np.maximum(positives, 1)[:, None]
    counts = np.ceil(RECALL_THRESHOLDS * total).astype(np.int64)
    counts -= (counts - 1) / total >= RECALL_THRESHOLDS
    counts += counts / total < RECALL_THRESHOLDS
    lowest: Ints = np.maximum(counts, 1)
    return lowest


def interpolate(precision: Floats, true: Ints, segments: Ints, needed: Ints) -> Floats:
    """[S, R] the highest precision at or after the detection with which `needed` [S, R] objects are found, else 0.

    Args:
        precision: [H] after each correct detection, sorted by segment, then by descending score.
        true: [H] correct detections of the segment until then, this one included.
        segments: [S + 1] first correct detection of each segment, and the end.
        needed: [S, R] ascending counts from 1.
    """
    starts, ends = segments[:-1], segments[1:]
    last = np.append(true, 0)[np.maximum(ends - 1, 0)]
    totals = np.where(ends > starts, last, 0)
    before = np.cumsum(totals) - totals
    running = true + np.repeat(before, ends - starts)  # ascends over all segments
    enough = needed <= totals[:, None]
    rows = np.where(enough, np.searchsorted(running, before[:, None] + needed), ends[:, None])
    # The highest precision between one threshold and the next, then from each threshold to the end.
    steps = np.maximum.reduceat(np.append(precision, 0.0), rows.ravel()).reshape(rows.shape)
    steps[~enough] = 0.0
    highest: Floats = np.maximum.accumulate(steps[:, ::-1], axis=1)[:, ::-1]
    return highest


def _running(counts: Ints) -> Ints:
    """Sum of the entries before each position, and of all."""
    sums = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums


def by_area(table: Table, low: float, high: float) -> tuple[Flags, Flags]:
    """Objects and detections outside of the areas from `low`² to `high`², both included, as in pycocotools."""
    return outside(table.objects.areas, low**2, high**2), outside(table.found.areas, low**2, high**2)


def outside(values: Floats, low: float, high: float) -> Flags:
    """Which values are below `low` or above `high`."""
    beyond: Flags = (values < low) | (values > high)
    return beyond
