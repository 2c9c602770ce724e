"""The numbers are bit-equal to pycocotools, of all images and of images that are drawn several times or not at all."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.coco_reference import imperfect, perfect, reference
from support.detection_sets import detections_of, draw_set, truth_of
from support.paths import ASSETS, SHARED

from pipeline.errors import DetectionError
from pipeline.evaluation.analysis.curves import lowest_counts
from pipeline.evaluation.analysis.numbers import Evaluation, Numbers
from pipeline.evaluation.analysis.table import build_table
from pipeline.evaluation.backends.base import RECALL_THRESHOLDS
from pipeline.evaluation.coco import ground_truth_of_file
from pipeline.evaluation.detections import Detections, concatenate, from_results_json


def numbers_of(truth: dict[str, Any], found: Detections) -> Numbers:
    return Evaluation(build_table(truth, found)).numbers()


def assert_same_bits(numbers: Numbers, truth: dict[str, Any], found: Detections) -> None:
    metrics, arrays = reference(truth, found.to_results())
    assert list(numbers.metrics.values()) == metrics
    assert np.array_equal(numbers.whole.precision, arrays.precision[..., 0, -1])
    assert np.array_equal(numbers.whole.recall, arrays.recall[..., 0, -1])


def test_numbers_own_fixture_has_the_bits_of_pycocotools() -> None:
    truth = ground_truth_of_file(ASSETS / "coco_small" / "annotations.json")
    found = from_results_json(ASSETS / "coco_small" / "results.json")
    assert_same_bits(numbers_of(truth, found), truth, found)


def test_numbers_official_fixture_has_the_bits_of_pycocotools() -> None:
    folder = SHARED / "coco_eval_fixture"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: cocoapi's fixture is not part of this repository")
    truth = ground_truth_of_file(folder / "instances_val2014_100.json")
    found = from_results_json(folder / "instances_val2014_fakebbox100_results.json")
    assert_same_bits(numbers_of(truth, found), truth, found)


def test_numbers_real_images_have_the_bits_of_pycocotools() -> None:
    file = SHARED / "coco_sample" / "annotations" / "instances_val2017.json"
    if not file.is_file():
        pytest.skip(f"{file} does not exist: COCO's images are not part of this repository")
    truth = ground_truth_of_file(file)
    found = imperfect(truth, per_image=30, seed=6)
    assert_same_bits(numbers_of(truth, found), truth, found)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 12), ties=st.booleans(), single=st.booleans())
def test_numbers_drawn_sets_have_the_bits_of_pycocotools(seed: int, images: int, ties: bool, single: bool) -> None:
    truth, found = draw_set(seed, images, ties=ties)
    found = replace(found, boxes_xywh=found.boxes_xywh.astype(np.float32), scores=found.scores.astype(np.float32))
    if seed % 3 == 0:  # boxes without area
        found.boxes_xywh[:: 1 + seed % 5, 2] = 0
    assert_same_bits(numbers_of(truth, found[:1] if single else found), truth, found[:1] if single else found)


@pytest.mark.parametrize("seed", range(6))
def test_numbers_of_weighted_images_are_those_of_copied_images(seed: int) -> None:
    truth, found = draw_set(seed, images=12)
    ids = [image["id"] for image in truth["images"]]
    weights = np.random.default_rng(seed).multinomial(len(ids), [1 / len(ids)] * len(ids))
    annotations, parts = [], [concatenate([])]
    for copy, image in enumerate(np.repeat(ids, weights).tolist(), 1):
        annotations += [{**a, "image_id": copy} for a in truth["annotations"] if a["image_id"] == image]
        own = found[found.image_ids == image]
        parts.append(replace(own, image_ids=np.full(len(own), copy)))
    annotations = [{**a, "id": number} for number, a in enumerate(annotations, 1)]
    copies = {**truth, "images": [{"id": copy} for copy in range(1, len(ids) + 1)], "annotations": annotations}
    assert_same_bits(Evaluation(build_table(truth, found)).numbers(weights), copies, concatenate(parts))


def test_numbers_limit_of_100_detections_is_that_of_an_image_and_category() -> None:
    truth = truth_of([(1, 1, (0, 0, 50, 50)), (1, 2, (60, 60, 50, 50))], images=1, categories=2)
    wrong = [(1, 1, (200 + k, 200, 9, 9), 0.9) for k in range(100)]
    found = detections_of([*wrong, (1, 1, (0, 0, 50, 50), 0.5), (1, 2, (60, 60, 50, 50), 0.4)])
    numbers = numbers_of(truth, found)
    assert_same_bits(numbers, truth, found)
    assert numbers.category_ap == pytest.approx([0.0, 1.0], abs=1e-12)


def test_numbers_perfect_detector_scores_one_wherever_there_are_objects() -> None:
    truth, _ = draw_set(3)
    numbers = numbers_of(truth, perfect(truth))
    for name, value in numbers.metrics.items():
        if name not in ("AR1", "AR10"):
            assert value == pytest.approx(1.0, abs=1e-12), name
    assert numbers.category_ap == pytest.approx([1.0, 1.0, 1.0, -1.0], abs=1e-12)


def test_numbers_without_objects_are_minus_one_and_without_detections_zero() -> None:
    truth, found = draw_set(4)
    assert set(numbers_of(truth, concatenate([])).metrics.values()) == {0.0}
    small = {**truth, "annotations": [{**a, "area": 99.0} for a in truth["annotations"]]}
    numbers = numbers_of(small, found)
    assert_same_bits(numbers, small, found)
    assert numbers.metrics["AP_large"] == numbers.metrics["AR_medium"] == -1
    assert set(numbers_of({**truth, "annotations": []}, found).metrics.values()) == {-1.0}


def test_numbers_without_a_category_are_minus_one() -> None:
    truth = {"images": [{"id": 1}], "annotations": [], "categories": []}
    assert set(numbers_of(truth, concatenate([])).metrics.values()) == {-1.0}


def test_build_table_unknown_image_raises() -> None:
    truth, found = draw_set(5)
    with pytest.raises(DetectionError):
        build_table(truth, found, [truth["images"][0]["id"]])


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 49, 99, 100, 101, 997, 36781])
def test_lowest_counts_are_where_searchsorted_puts_the_thresholds(total: int) -> None:
    recalls = np.arange(1, total + 1) / total
    expected = np.searchsorted(recalls, RECALL_THRESHOLDS, side="left") + 1
    assert lowest_counts(np.array([total]))[0].tolist() == expected.tolist()
