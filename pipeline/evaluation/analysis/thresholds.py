"""From which score on detections are best kept: F1, precision and recall at IoU 0.5. Never fails."""

import numpy as np

from pipeline.evaluation.analysis.result import OperatingPoint, ThresholdCurve
from pipeline.evaluation.analysis.table import Flags
from pipeline.evaluation.analysis.verdicts import Verdicts
from pipeline.evaluation.backends.base import Floats

STEPS: Floats = np.linspace(0.0, 1.0, 101)


def best_point(scores: Floats, correct: Flags, positives: int) -> OperatingPoint:
    """The threshold with the highest F1; the highest one of equals.

    Args:
        scores: [N] of the detections that count.
        correct: [N] whether they have found an object.
        positives: objects.

    Returns:
        A score of a detection as the threshold, or nothing kept, with threshold 1.0 and precision 1.0, if no threshold
        has an F1 above 0.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # a threshold keeps all of one score or none
    true, kept = np.cumsum(correct[order])[ends], ends + 1
    f1 = 2 * true / np.maximum(kept + positives, 1)
    if not f1.any():
        return OperatingPoint(1.0, 1.0, 0.0, 0.0)
    best = int(f1.argmax())
    return OperatingPoint(
        threshold=float(scores[order][ends[best]]),
        precision=float(true[best] / kept[best]),
        recall=float(true[best] / positives),
        f1=float(f1[best]),
    )


def category_points(verdicts: Verdicts) -> list[OperatingPoint]:
    """[K] `best_point` of each category."""
    table = verdicts.table
    positives = table.positives(table.objects.crowd)
    rows = table.by_score[~verdicts.in_crowd[table.by_score]]
    ends = np.searchsorted(table.found.categories[rows], np.arange(1, len(positives)))
    return [
        best_point(table.found.scores[its], verdicts.correct[its], int(count))
        for its, count in zip(np.split(rows, ends), positives, strict=True)
    ]


def threshold_curve(verdicts: Verdicts) -> ThresholdCurve:
    """All categories together."""
    table = verdicts.table
    positives = int(np.count_nonzero(~table.objects.crowd))
    counted = ~verdicts.in_crowd
    scores, correct = table.found.scores[counted], verdicts.correct[counted]
    order = np.argsort(scores, kind="stable")
    firsts = np.searchsorted(scores[order], STEPS)
    kept = len(scores) - firsts
    true = np.append(np.cumsum(correct[order][::-1])[::-1], 0)[firsts]
    return ThresholdCurve(
        thresholds=tuple(STEPS.tolist()),
        precision=tuple(np.where(kept, true / np.maximum(kept, 1), 1.0).tolist()),
        recall=tuple((true / max(positives, 1)).tolist()),
        f1=tuple((2 * true / np.maximum(kept + positives, 1)).tolist()),
        best=best_point(scores, correct, positives),
    )
