"""Planted errors get the name of their cause, and the costs are those of tidecv."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.coco_reference import perfect
from support.detection_sets import detections_of, draw_set, truth_of
from support.paths import ASSETS

from pipeline.evaluation.analysis.numbers import Evaluation
from pipeline.evaluation.analysis.result import CAUSES, Cause, Errors
from pipeline.evaluation.analysis.table import build_table
from pipeline.evaluation.analysis.verdicts import errors, judge
from pipeline.evaluation.coco import ground_truth_of_file
from pipeline.evaluation.detections import Detections, concatenate, from_results_json

# tidecv 1.0.1 on tests/assets/coco_small, each score lowered by a millionth of its place in the file, so that no two
# are equal. In percent, as tidecv has it.
TIDECV_AP = 54.63557407238246
TIDECV_COSTS = {
    "classification": 6.158185305733319,
    "localisation": 1.1674580515582065,
    "both": 1.4271335005186216,
    "duplicate": 3.16247788480446,
    "background": 4.132199388143114,
    "missed": 19.670619539868206,
}
TIDECV_COUNTS = {"classification": 10, "localisation": 2, "both": 6, "duplicate": 16, "background": 46, "missed": 28}
TIDECV_FALSE_POSITIVE, TIDECV_FALSE_NEGATIVE = 12.295118996924465, 27.398281521752644
IN_CROWD = 6  # detections in crowd regions, which tidecv counts as background


def errors_of(truth: dict[str, Any], found: Detections) -> Errors:
    return errors(judge(build_table(truth, found)))


def spread(images: int = 12, categories: int = 3) -> dict[str, Any]:
    """Each image has one object of each category, 200 pixels apart, 100 pixels wide."""
    objects = [
        (image, category, (200.0 * category, 50.0, 100.0, 100.0))
        for image in range(1, images + 1)
        for category in range(1, categories + 1)
    ]
    return truth_of(objects, images, categories)


def plant(truth: dict[str, Any], cause: Cause, every: int) -> tuple[Detections, int]:
    """Perfect detections, except that each `every`-th object has the error `cause`; also how many have it."""
    rows, planted = [], 0
    highest = max(category["id"] for category in truth["categories"])
    for number, a in enumerate(truth["annotations"]):
        image, category, (x, y, w, h) = a["image_id"], a["category_id"], a["bbox"]
        score = 1 - number / 1000
        other = category % highest + 1
        correct = (image, category, (x, y, w, h), score)
        if number % every:
            rows.append(correct)
            continue
        planted += 1
        rows += {
            "classification": [(image, other, (x, y, w, h), score)],
            "localisation": [(image, category, (x + 0.5 * w, y, w, h), score)],  # IoU 1/3
            "both": [correct, (image, other, (x + 0.5 * w, y, w, h), score)],
            "duplicate": [correct, (image, category, (x, y, w, 0.9 * h), score - 1e-4)],
            "background": [correct, (image, category, (x, y + 500, w, h), score)],
            "missed": [],
        }[cause]
    return detections_of(rows), planted


@settings(max_examples=30)
@given(cause=st.sampled_from(CAUSES), every=st.integers(1, 9), images=st.integers(1, 6), categories=st.integers(2, 4))
def test_errors_planted_cause_is_the_only_one(cause: Cause, every: int, images: int, categories: int) -> None:
    truth = spread(images, categories)
    found, planted = plant(truth, cause, every)
    result = errors_of(truth, found)
    assert {cost.cause: cost.count for cost in result.costs} == {c: planted if c == cause else 0 for c in CAUSES}
    for cost in result.costs:
        assert cost.share == (cost.cause == cause)
        if cost.cause != cause:
            assert cost.ap_cost == 0
    costs = {cost.cause: cost.ap_cost for cost in result.costs}
    assert costs[cause] == pytest.approx(1 - result.ap, abs=1e-9)  # nothing else is wrong


def test_errors_mixed_causes_have_their_shares() -> None:
    truth = spread(images=20)
    duplicates, twice = plant(truth, "duplicate", 2)
    swapped, changed = plant(truth, "classification", 10)
    missing = {(a["image_id"], a["category_id"]) for a in truth["annotations"][::10]}
    keys = list(zip(duplicates.image_ids.tolist(), duplicates.category_ids.tolist(), strict=True))
    rest = duplicates[np.array([key not in missing for key in keys])]
    wrong = swapped[np.isin(swapped.orders, range(0, 60, 10))]
    found = concatenate([rest, replace(wrong, orders=wrong.orders + 1000)])
    result = errors_of(truth, found)
    counts = {cost.cause: cost.count for cost in result.costs}
    assert counts == dict.fromkeys(CAUSES, 0) | {"classification": changed, "duplicate": twice - changed}
    assert sum(cost.share for cost in result.costs) == pytest.approx(1.0)
    costs = {cost.cause: cost.ap_cost for cost in result.costs}
    assert costs["classification"] > 0 < costs["duplicate"]
    assert costs["missed"] == 0  # the swapped detections would find every object


def test_errors_perfect_detector_has_none() -> None:
    truth, _ = draw_set(1)
    result = errors_of(truth, perfect(truth))
    assert result.ap == pytest.approx(1.0)
    assert [cost.count for cost in result.costs] == [0] * 6
    assert [cost.ap_cost for cost in result.costs] == [0.0] * 6
    assert result.false_positive_cost == result.false_negative_cost == 0


def test_errors_costs_are_those_of_tidecv() -> None:
    truth = ground_truth_of_file(ASSETS / "coco_small" / "annotations.json")
    found = from_results_json(ASSETS / "coco_small" / "results.json")
    result = errors_of(truth, replace(found, scores=found.scores - 1e-6 * np.arange(len(found))))
    assert 100 * result.ap == pytest.approx(TIDECV_AP, abs=1e-9)
    for cost in result.costs:
        assert 100 * cost.ap_cost == pytest.approx(TIDECV_COSTS[cost.cause], abs=1e-9)
        assert cost.count + IN_CROWD * (cost.cause == "background") == TIDECV_COUNTS[cost.cause]
    assert 100 * result.false_positive_cost == pytest.approx(TIDECV_FALSE_POSITIVE, abs=1e-9)
    # Less exact: the recall threshold 0.35 of tidecv is the float before that of pycocotools.
    assert 100 * result.false_negative_cost == pytest.approx(TIDECV_FALSE_NEGATIVE, abs=5e-3)


@pytest.mark.parametrize("seed", range(5))
def test_errors_ap_is_ap50_and_counts_are_complete(seed: int) -> None:
    truth, found = draw_set(seed, ties=seed % 2 == 1)
    table = build_table(truth, found)
    verdicts = judge(table)
    result = errors(verdicts)
    assert result.ap == pytest.approx(Evaluation(table).numbers().metrics["AP50"], abs=1e-12)
    counts = {cost.cause: cost.count for cost in result.costs}
    wrong = sum(count for cause, count in counts.items() if cause != "missed")
    assert verdicts.correct.sum() + verdicts.in_crowd.sum() + wrong == len(table.found)
    fixable = len(set(verdicts.targets[verdicts.targets >= 0].tolist()))
    assert verdicts.correct.sum() + counts["missed"] + fixable == np.count_nonzero(~table.objects.crowd)
    assert all(0 <= cost.ap_cost <= 1 for cost in result.costs)


def test_errors_only_the_best_of_two_shifted_boxes_is_corrected() -> None:
    truth = spread(images=1, categories=1)
    shifted = [(1, 1, (250.0, 50.0, 100.0, 100.0), score) for score in (0.9, 0.8)]
    result = errors_of(truth, detections_of(shifted))
    costs = {cost.cause: cost for cost in result.costs}
    assert costs["localisation"].count == 2
    assert costs["localisation"].ap_cost == pytest.approx(1.0)  # the second one is removed, not a second find
    assert costs["missed"].count == 0


def test_errors_detection_in_crowd_region_is_not_counted() -> None:
    truth = spread(images=2, categories=2)
    region = {"image_id": 1, "category_id": 1, "bbox": [0, 300, 400, 400], "area": 160000, "iscrowd": 1}
    truth["annotations"].append(region)
    inside = detections_of([(1, 1, (50, 350, 60, 60), 1.0), (1, 1, (150, 350, 60, 60), 1.0)])
    result = errors_of(truth, concatenate([perfect(truth), replace(inside, orders=inside.orders + 100)]))
    assert [cost.count for cost in result.costs] == [0] * 6
    assert result.ap == pytest.approx(1.0)


def test_errors_empty_sides_have_defined_numbers() -> None:
    truth, found = draw_set(2)
    nothing = errors_of(truth, concatenate([]))
    objects = sum(not a["iscrowd"] for a in truth["annotations"])
    assert (nothing.ap, nothing.costs[-1].count, nothing.costs[-1].ap_cost) == (0.0, objects, 1.0)
    bare = errors_of({**truth, "annotations": []}, found)
    assert bare.ap == -1
    assert {cost.cause: cost.count for cost in bare.costs}["background"] == len(found)
    assert all(cost.ap_cost == 0 for cost in bare.costs)
