"""Swaps, inventions and misses are counted where they belong, and nothing is counted twice."""

from dataclasses import replace

import numpy as np
import pytest
from support.coco_reference import perfect
from support.detection_sets import detections_of, draw_set, truth_of

from pipeline.evaluation.analysis.confusion import confusion
from pipeline.evaluation.analysis.table import build_table
from pipeline.evaluation.analysis.verdicts import judge
from pipeline.evaluation.detections import concatenate


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_confusion_counts_each_object_and_each_kept_detection_once(seed: int, threshold: float) -> None:
    truth, found = draw_set(seed, ties=seed == 3)
    table = build_table(truth, found)
    verdicts = judge(table)
    counts = np.array(confusion(verdicts, threshold).counts)
    assert counts[:-1].sum(1).tolist() == table.positives(table.objects.crowd).tolist()
    kept = (table.found.scores >= threshold) & ~verdicts.in_crowd
    assert counts[:, :-1].sum(0).tolist() == np.bincount(table.found.categories[kept], minlength=4).tolist()
    assert np.trace(counts) == (kept & verdicts.correct).sum()
    assert counts[-1, -1] == 0


def test_confusion_names_swaps_inventions_and_misses() -> None:
    objects = [(1, 1, (0, 0, 40, 40)), (1, 2, (100, 0, 40, 40)), (2, 3, (0, 0, 40, 40)), (2, 1, (200, 0, 40, 40))]
    rows = [
        (1, 1, (0, 0, 40, 40), 0.9),
        (1, 3, (100, 0, 40, 40), 0.9),  # class 2 seen as class 3
        (2, 2, (300, 300, 40, 40), 0.9),  # nothing is there
        (2, 3, (0, 0, 40, 40), 0.1),  # below the threshold
    ]
    counts = confusion(judge(build_table(truth_of(objects, 2, 3), detections_of(rows))), 0.5).counts
    assert counts == ((1, 0, 0, 1), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 0, 0))


def test_confusion_right_category_comes_before_a_better_score_of_another() -> None:
    rows = [(1, 2, (0, 0, 40, 40), 0.9), (1, 1, (0, 0, 40, 40), 0.8)]
    counts = confusion(judge(build_table(truth_of([(1, 1, (0, 0, 40, 40))], 1, 2), detections_of(rows))), 0.0).counts
    assert counts == ((1, 0, 0), (0, 0, 0), (0, 1, 0))


def test_confusion_perfect_detector_is_diagonal_and_no_detection_all_background() -> None:
    truth, _ = draw_set(7)
    table = build_table(truth, perfect(truth))
    counts = np.array(confusion(judge(table), 0.5).counts)
    assert np.array_equal(counts, np.diag(np.diag(counts)))
    nothing = np.array(confusion(judge(build_table(truth, concatenate([]))), 0.5).counts)
    assert nothing[:-1, -1].tolist() == np.diag(counts)[:-1].tolist()
    assert nothing.sum() == counts.sum()


def test_confusion_leaves_out_detections_in_crowd_regions() -> None:
    truth = truth_of([(1, 1, (0, 0, 40, 40))], 1, 1)
    truth["annotations"].append(
        {"image_id": 1, "category_id": 1, "bbox": [100, 100, 200, 200], "area": 4e4, "iscrowd": 1}
    )
    inside = detections_of([(1, 1, (120, 120, 40, 40), 0.9)])
    found = concatenate([perfect(truth), replace(inside, orders=inside.orders + 9)])
    assert confusion(judge(build_table(truth, found)), 0.0).counts == ((1, 0), (0, 0))
