"""The best threshold is the best of all, and curves agree with counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.coco_reference import perfect
from support.detection_sets import detections_of, draw_set, truth_of

from pipeline.evaluation.analysis.result import OperatingPoint
from pipeline.evaluation.analysis.table import build_table
from pipeline.evaluation.analysis.thresholds import best_point, category_points, threshold_curve
from pipeline.evaluation.analysis.verdicts import judge
from pipeline.evaluation.detections import concatenate


@given(
    found=st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans()), max_size=12),
    missed=st.integers(0, 3),
)
def test_best_point_has_the_highest_f1_of_all_thresholds(found: list[tuple[float, bool]], missed: int) -> None:
    scores, correct = np.array([s for s, _ in found], float), np.array([c for _, c in found], bool)
    positives = int(correct.sum()) + missed
    point = best_point(scores, correct, positives)
    f1s = {}
    for threshold in np.unique(scores).tolist():
        kept = scores >= threshold
        f1s[threshold] = 2 * correct[kept].sum() / (kept.sum() + positives)
    assert point.f1 == max(f1s.values(), default=0.0)
    if point.f1:
        assert point.threshold == max(t for t, f1 in f1s.items() if f1 == point.f1)
        kept = scores >= point.threshold
        assert point.precision == correct[kept].mean()
        assert point.recall == correct[kept].sum() / positives
    else:
        assert point == OperatingPoint(1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_threshold_curve_agrees_with_counting(seed: int) -> None:
    truth, found = draw_set(seed, ties=True)
    table = build_table(truth, found)
    verdicts = judge(table)
    curve = threshold_curve(verdicts)
    objects = sum(not a["iscrowd"] for a in truth["annotations"])
    for threshold, precision, recall, f1 in zip(curve.thresholds, curve.precision, curve.recall, curve.f1, strict=True):
        kept = (table.found.scores >= threshold) & ~verdicts.in_crowd
        true = (verdicts.correct & kept).sum()
        assert recall == true / objects
        assert precision == (true / kept.sum() if kept.any() else 1.0)
        assert f1 == pytest.approx(2 * true / (kept.sum() + objects))
    assert curve.best.f1 >= max(curve.f1)


def test_category_points_separate_categories() -> None:
    truth = truth_of([(1, 1, (0, 0, 9, 9)), (1, 2, (50, 0, 9, 9))], images=1, categories=3)
    found = [
        (1, 1, (0, 0, 9, 9), 0.3),
        (1, 1, (99, 0, 9, 9), 0.2),
        (1, 2, (90, 90, 9, 9), 0.8),
        (1, 2, (50, 0, 9, 9), 0.6),
    ]
    first, second, third = category_points(judge(build_table(truth, detections_of(found))))
    assert first == OperatingPoint(0.3, 1.0, 1.0, 1.0)
    assert second == OperatingPoint(0.6, 0.5, 1.0, 2 / 3)
    assert third == OperatingPoint(1.0, 1.0, 0.0, 0.0)


def test_threshold_curve_perfect_and_empty() -> None:
    truth, _ = draw_set(1)
    assert threshold_curve(judge(build_table(truth, perfect(truth)))).best == OperatingPoint(1.0, 1.0, 1.0, 1.0)
    empty = threshold_curve(judge(build_table(truth, concatenate([]))))
    assert (set(empty.precision), set(empty.recall), empty.best.f1) == ({1.0}, {0.0}, 0.0)
