"""The whole analysis agrees with its parts, with pycocotools, and with itself in any order of the detections."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.coco_reference import perfect, reference
from support.detection_sets import detections_of, draw_set, truth_of

from pipeline.errors import DetectionError
from pipeline.evaluation.analysis.analyse import analyse, compare
from pipeline.evaluation.analysis.result import CAUSES, FORMAT, VERSION, Analysis, to_json
from pipeline.evaluation.coco import METRICS, mean_known
from pipeline.evaluation.detections import Detections, concatenate


def assert_consistent(analysis: Analysis, truth: dict[str, Any]) -> None:
    """What must be true of every analysis."""
    assert analysis.images == len(truth["images"])
    assert analysis.objects == sum(category.objects for category in analysis.categories)
    assert analysis.detections == sum(category.detections for category in analysis.categories)
    assert tuple(analysis.metrics) == METRICS
    assert tuple(cost.cause for cost in analysis.errors.costs) == CAUSES
    for cost in analysis.errors.costs:
        assert cost.count == sum(category.errors[cost.cause] for category in analysis.categories)
    shares = sum(cost.share for cost in analysis.errors.costs)
    assert shares == pytest.approx(float(any(cost.count for cost in analysis.errors.costs)))
    counts = np.array(analysis.confusion.counts)
    assert counts[:-1].sum() == analysis.objects
    assert analysis.confusion.threshold == analysis.thresholds.best.threshold
    aps = [category.ap.value for category in analysis.categories if category.ap.value > -1]
    assert analysis.metrics["AP"].value == pytest.approx(np.mean(aps) if aps else -1)
    assert [category.objects == 0 for category in analysis.categories] == [
        category.ap.value == -1 for category in analysis.categories
    ]
    for estimate in (*analysis.metrics.values(), *(category.ap for category in analysis.categories)):
        if estimate.interval is not None:  # it may also be missing because no draw has the category
            assert estimate.value > -1
            assert -1 < estimate.interval.low <= estimate.interval.high <= 1
            assert 1 <= estimate.interval.draws <= analysis.draws
    for image in (*analysis.worst, *analysis.most_missed):
        assert image.correct + image.missed == sum(not obj.crowd for obj in image.objects)
    tree = json.loads(to_json(analysis))
    assert (tree["format"], tree["version"]) == (FORMAT, VERSION)
    assert set(tree) == {"format", "version", *(field.name for field in dataclasses.fields(Analysis))}


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 9), ties=st.booleans())
def test_analyse_drawn_sets_are_consistent(seed: int, images: int, ties: bool) -> None:
    truth, found = draw_set(seed, images, ties=ties)
    assert_consistent(analyse(truth, found, against=found[::2], queries=found, draws=3), truth)


@pytest.mark.parametrize("detections", [0, 1])
@pytest.mark.parametrize("objects", [0, 1])
def test_analyse_at_most_one_detection_and_object_are_consistent(detections: int, objects: int) -> None:
    box = (10.0, 10.0, 50.0, 50.0)
    truth = truth_of([(2, 1, box)] * objects, images=2, categories=2)
    found = detections_of([(2, 1, box, 0.5)] * detections)
    analysis = analyse(truth, found, draws=5)
    assert_consistent(analysis, truth)
    assert analysis.metrics["AP"].value == pytest.approx(-1 if not objects else float(detections), abs=1e-12)


def test_analyse_values_are_those_of_pycocotools() -> None:
    truth, found = draw_set(11, images=40)
    analysis, (metrics, arrays) = analyse(truth, found, draws=2), reference(truth, found.to_results())
    assert [estimate.value for estimate in analysis.metrics.values()] == metrics
    precision, recall = arrays.precision[..., 0, -1], arrays.recall[..., 0, -1]
    for k, category in enumerate(analysis.categories):
        assert category.id == truth["categories"][k]["id"]
        assert category.ap.value == mean_known(precision[:, :, k])
        assert (category.ap50, category.ap75) == (mean_known(precision[0, :, k]), mean_known(precision[5, :, k]))
        assert category.ar100 == mean_known(recall[:, k])
    present = {(a["category_id"], a["image_id"]) for a in truth["annotations"] if not a["iscrowd"]}
    for category in analysis.categories:
        assert category.images == sum(c == category.id for c, _ in present)


def test_analyse_perfect_detector_scores_one_and_has_no_errors() -> None:
    truth, _ = draw_set(12)
    analysis = analyse(truth, perfect(truth), draws=4)
    assert_consistent(analysis, truth)
    for name in set(METRICS) - {"AR1", "AR10"}:
        assert analysis.metrics[name].value == pytest.approx(1.0, abs=1e-12)
    assert analysis.thresholds.best.f1 == 1.0
    assert analysis.worst == analysis.most_missed == ()
    for category in analysis.categories[:-1]:
        assert category.best.f1 == 1.0
        assert set(category.errors.values()) == {0}


def test_analyse_kept_errors_are_those_of_the_kept_detections_alone() -> None:
    truth, found = draw_set(18, images=60)
    analysis = analyse(truth, found, draws=0)
    kept = found[found.scores >= analysis.thresholds.best.threshold]
    assert 0 < len(kept) < len(found)
    assert analysis.kept_errors == analyse(truth, kept, draws=0).errors
    counts = {cost.cause: cost.count for cost in analysis.kept_errors.costs}
    assert sum(counts.values()) - counts["missed"] == np.array(analysis.confusion.counts)[:, :-1].sum() - np.trace(
        analysis.confusion.counts
    )


def test_analyse_order_of_detections_does_not_matter() -> None:
    truth, found = draw_set(13)
    shuffled = found[np.random.default_rng(0).permutation(len(found))]
    assert to_json(analyse(truth, shuffled, draws=3)) == to_json(analyse(truth, found, draws=3))


def test_analyse_changes_no_argument() -> None:
    truth, found = draw_set(14)
    before = json.dumps(truth), json.dumps(found.to_results())
    analyse(truth, found, draws=1)
    assert before == (json.dumps(truth), json.dumps(found.to_results()))


def test_analyse_subset_of_images_is_the_analysis_of_that_subset() -> None:
    truth, found = draw_set(15)
    ids = [image["id"] for image in truth["images"]][:11]
    own = found[np.isin(found.image_ids, ids)]
    smaller = {
        "images": [image for image in truth["images"] if image["id"] in ids],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in ids],
        "categories": truth["categories"],
    }
    assert to_json(analyse(truth, own, ids, draws=3)) == to_json(analyse(smaller, own, draws=3))
    with pytest.raises(DetectionError):
        analyse(truth, found, ids, draws=0)


def test_analyse_comparison_is_that_of_compare() -> None:
    truth, found = draw_set(16)
    worse: Detections = found[::3]
    analysis = analyse(truth, found, against=worse, draws=6, seed=5)
    comparison = compare(truth, found, worse, draws=6, seed=5)
    assert analysis.comparison == comparison
    for name, difference in comparison.metrics.items():
        assert difference.value == analysis.metrics[name].value
        assert difference.difference.value == difference.value - difference.other
    other = analyse(truth, worse, draws=0)
    assert {c: cost for c, (_, cost) in comparison.error_costs.items()} == {
        cost.cause: cost.ap_cost for cost in other.errors.costs
    }


def test_compare_category_without_objects_has_no_difference() -> None:
    truth, found = draw_set(17)
    empty = compare(truth, found, concatenate([]), draws=4).categories[-1].ap
    assert (empty.value, empty.other, empty.difference.value, empty.difference.interval) == (-1, -1, 0.0, None)
    assert empty.better is None
