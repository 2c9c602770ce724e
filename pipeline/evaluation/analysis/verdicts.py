"""What is wrong with each detection, and what it costs: TIDE's six causes of errors.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, arXiv 2008.08115. The rules
are those of the authors' package tidecv 1.0.1, which needs OpenCV and plotting, works detection by detection in Python
and has not changed since 2020. Never fails. Differences from tidecv:

- AP is averaged over the categories that have objects, as COCO does. tidecv counts AP 0 for a category with
  detections and no object.
- A detection in a crowd region is not counted as an error, because it costs no AP. As in tidecv, its correction can
  add an object, which is part of the cost.
- The best 100 detections of an image and category count, as in COCO; in tidecv the best 100 of an image.
- Recall thresholds have the bits of pycocotools; ten of tidecv's, such as 0.35, are the next smaller float.
- Where scores are equal, the order of detections decides; tidecv puts wrong detections first after a correction.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.analysis.curves import interpolate, lowest_counts
from pipeline.evaluation.analysis.matching import match
from pipeline.evaluation.analysis.result import CAUSES, Cause, ErrorCost, Errors
from pipeline.evaluation.analysis.table import BACKGROUND_IOU, CORRECT_IOU, Flags, Table
from pipeline.evaluation.backends.base import Floats, Ints

CORRECT, CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(6)  # wrong ones as in CAUSES, plus 1


@dataclass(frozen=True)
class Verdicts:
    """Each detection of a table at CORRECT_IOU."""

    table: Table
    objects: Ints  # [D] the object that a correct detection has found, else -1
    in_crowd: Flags  # [D] not correct, and in a crowd region of its category: it does not count
    causes: NDArray[np.int8]  # [D] CORRECT or the number of a cause
    targets: Ints  # [D] the unfound object that a detection would find with the right category or box, else -1

    @cached_property
    def correct(self) -> Flags:
        """[D] the detections that have found an object."""
        return self.objects >= 0

    @cached_property
    def wrong(self) -> Flags:
        """[D] the detections that count and have found nothing."""
        wrong: Flags = ~self.correct & ~self.in_crowd
        return wrong

    @cached_property
    def unfound(self) -> Flags:
        """[G] the objects, crowd regions excepted, that no detection has found."""
        unfound = ~self.table.objects.crowd
        unfound[self.objects[self.correct]] = False
        return unfound

    @cached_property
    def missed(self) -> Flags:
        """[G] the objects that also the right category or box of a detection would not find."""
        missed = self.unfound.copy()
        missed[self.targets[self.targets >= 0]] = False
        return missed

    def cause(self, row: int) -> Cause | None:
        """The cause of the error of detection `row`; None if it is correct or does not count."""
        return CAUSES[self.causes[row] - 1] if self.wrong[row] else None


def judge(table: Table) -> Verdicts:
    """The verdict on every detection."""
    crowd, categories = table.objects.crowd, table.found.categories
    matches = match(table, crowd, np.array([CORRECT_IOU]))
    taken = np.full(len(table.found), -1, np.int64)
    taken[matches.found] = matches.objects[0]
    in_crowd = (taken >= 0) & np.append(crowd, False)[taken]
    objects = np.where(in_crowd, -1, taken)
    found = np.zeros(len(crowd) + 1, np.bool_)
    found[objects] = True
    found[-1] = False  # stands for "no object"

    pairs = table.pairs[~crowd[table.pairs.objects]]
    same = categories[pairs.found] == table.objects.categories[pairs.objects]
    own, own_iou = _nearest(table, same)
    other, other_iou = _nearest(table, ~same)
    causes = np.full(len(categories), BOTH, np.int8)
    causes[np.maximum(own_iou, other_iou) <= BACKGROUND_IOU] = BACKGROUND
    occupied = pairs.found[same & found[pairs.objects] & (pairs.ious >= CORRECT_IOU)]
    causes[occupied] = DUPLICATE
    swapped = other_iou >= CORRECT_IOU
    causes[swapped] = CLASSIFICATION
    shifted = (own_iou >= BACKGROUND_IOU) & (own_iou <= CORRECT_IOU)
    causes[shifted] = LOCALISATION
    targets = np.where(shifted, own, np.where(swapped, other, -1))
    wrong = objects < 0
    causes[~wrong] = CORRECT
    targets[~wrong | found[targets]] = -1
    return Verdicts(table, objects, in_crowd, causes, targets)


def _nearest(table: Table, kept: Flags) -> tuple[Ints, Floats]:
    """[D] the object with the highest IoU, the first one of equals, of the pairs that are `kept`; -1 and 0 if none.

    `kept` has an entry for each pair with an object that is not a crowd region.
    """
    pairs = table.pairs[~table.objects.crowd[table.pairs.objects]][kept]
    pairs = pairs[np.lexsort((pairs.objects, -pairs.ious, pairs.found))]
    found, firsts = np.unique(pairs.found, return_index=True)
    objects, ious = np.full(len(table.found), -1, np.int64), np.zeros(len(table.found))
    objects[found], ious[found] = pairs.objects[firsts], pairs.ious[firsts]
    return objects, ious


def error_counts(verdicts: Verdicts) -> Ints:
    """[6, K] errors of each cause by the category of the detection, missed objects by their own."""
    table = verdicts.table
    counts = np.zeros((len(CAUSES), len(table.category_ids)), np.int64)
    rows = np.flatnonzero(verdicts.wrong)
    np.add.at(counts, (verdicts.causes[rows] - 1, table.found.categories[rows]), 1)
    counts[-1] = np.bincount(table.objects.categories[verdicts.missed], minlength=counts.shape[1])
    return counts


def errors(verdicts: Verdicts) -> Errors:
    """Count the errors of each cause, and compute what AP at CORRECT_IOU gains without them."""
    table, correct, targets = verdicts.table, verdicts.correct, verdicts.targets
    # Of several detections that would find the same object, the one with the highest score is corrected.
    rows = np.flatnonzero(targets >= 0)
    rows = rows[np.lexsort((table.found.image_ranks[rows], targets[rows]))]
    chosen = np.zeros(len(table.found), np.bool_)
    chosen[rows[np.unique(targets[rows], return_index=True)[1]]] = True

    positives = table.positives(table.objects.crowd)
    counted = np.flatnonzero(~verdicts.in_crowd)
    base = _ap(table, counted, correct, positives)
    counts, costs = error_counts(verdicts).sum(1).tolist(), []
    for number, cause in enumerate(CAUSES, 1):
        if cause == "missed":
            after = _ap(table, counted, correct, _without(table, verdicts.missed), positives)
        else:
            of_cause = verdicts.causes == number
            fixed = of_cause & chosen
            categories = table.found.categories.copy()
            categories[fixed] = table.objects.categories[targets[fixed]]
            kept = np.flatnonzero(np.where(of_cause, chosen, ~verdicts.in_crowd))
            after = _ap(table, kept, correct | fixed, positives, categories=categories)
        costs.append(_gain(base, after))
    without_wrong = _ap(table, np.flatnonzero(correct), correct, positives)
    without_unfound = _ap(table, counted, correct, _without(table, verdicts.unfound), positives)
    return Errors(
        iou=CORRECT_IOU,
        background_iou=BACKGROUND_IOU,
        ap=base,
        costs=tuple(
            ErrorCost(cause, count, count / max(1, sum(counts)), cost)
            for cause, count, cost in zip(CAUSES, counts, costs, strict=True)
        ),
        false_positive_cost=_gain(base, without_wrong),
        false_negative_cost=_gain(base, without_unfound),
    )


def _without(table: Table, objects: Flags) -> Ints:
    """[K] objects of each category without some [G] of them."""
    return table.positives(table.objects.crowd | objects)


def _gain(before: float, after: float) -> float:
    """As tidecv, which takes a loss for an effect of the 101 recall thresholds."""
    return max(0.0, after - before)


def _ap(
    table: Table,
    rows: Ints,
    correct: Flags,
    positives: Ints,
    before: Ints | None = None,
    categories: Ints | None = None,
) -> float:
    """AP of detections.

    Args:
        table: the detections.
        rows: [N] those that count.
        correct: [D] which detections have found an object.
        positives: [K] objects of each category.
        before: [K] the same before the correction. A category that had objects, and has none now, has AP 0 if it has
            detections, and is left out otherwise.
        categories: [D] categories of the detections, if they are not those of the table.

    Returns:
        Mean over the categories with objects; -1 if there was never an object, 1 if every category is left out.
    """
    of_row = (table.found.categories if categories is None else categories)[rows]
    before = positives if before is None else before
    order = np.lexsort((table.found.image_ranks[rows], table.found.images[rows], -table.found.scores[rows], of_row))
    hits = np.flatnonzero(correct[rows[order]])
    category = of_row[order]
    firsts = np.searchsorted(category, np.arange(len(positives) + 1))
    segments = np.searchsorted(hits, firsts)
    starts = category[hits]
    true = np.arange(1, len(hits) + 1) - segments[starts]
    precision = true / (hits + 1 - firsts[starts])
    curves = interpolate(precision, true, segments, lowest_counts(positives))
    curves[positives == 0] = 0.0
    counted = (positives > 0) | ((before > 0) & (np.diff(firsts) > 0))
    if not counted.any():
        return 1.0 if before.any() else -1.0
    return float(curves[counted].mean(axis=1).sum() / counted.sum())
