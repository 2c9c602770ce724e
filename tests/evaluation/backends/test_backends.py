"""Every backend that is offered gives the bits of pycocotools: 12 numbers and all arrays, drawn and recorded data."""

from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.coco_reference import imperfect, perfect, reference
from support.distributed import run_ranks
from support.paths import ASSETS, SHARED

from pipeline.config import ApBackend
from pipeline.errors import ConfigError, DetectionError
from pipeline.evaluation.backends.base import IOU_THRESHOLDS, LIMITS, RECALL_THRESHOLDS, Arrays, Task
from pipeline.evaluation.backends.hotcoco import Hotcoco
from pipeline.evaluation.backends.select import is_installed, load_backend
from pipeline.evaluation.coco import METRICS, coco_scores, ground_truth_of_file, summarise
from pipeline.evaluation.detections import Detections, concatenate, from_results_json, gather
from pipeline.runtime import Runtime, single

NAMES: tuple[ApBackend, ...] = get_args(ApBackend)
OFFICIAL, REAL, SMALL = SHARED / "coco_eval_fixture", SHARED / "coco_sample", ASSETS / "coco_small"
Case = tuple[dict[str, Any], Detections]


def installed(name: ApBackend) -> ApBackend:
    if name != "auto" and not is_installed(name):
        pytest.skip(f"{name} is not installed: pip install -e '.[evaluators]'")
    return name


def data(kind: str) -> Case:
    if kind == "small":
        return ground_truth_of_file(SMALL / "annotations.json"), from_results_json(SMALL / "results.json")
    if not (OFFICIAL if kind == "official" else REAL).is_dir():
        pytest.skip(f"{SHARED} does not exist: COCO's data are not part of this repository")
    if kind == "official":
        results = from_results_json(OFFICIAL / "instances_val2014_fakebbox100_results.json")
        return ground_truth_of_file(OFFICIAL / "instances_val2014_100.json"), results
    truth = ground_truth_of_file(REAL / "annotations" / "instances_val2017.json")
    return truth, imperfect(truth, 60, seed=0)


@cache
def expected_of(kind: str) -> tuple[list[float], Arrays]:
    truth, found = data(kind)
    return reference(truth, found.to_results())


def assert_equal(case: Case, name: ApBackend, expected: tuple[list[float], Arrays], limit: int = 100) -> None:
    scores = coco_scores(*case, backend=name, limit=limit)
    assert scores.arrays.differences(expected[1]) == []
    assert list(scores.metrics.values()) == expected[0]
    assert tuple(scores.metrics) == METRICS


@pytest.mark.parametrize("kind", ["small", "official", "real"])
def test_backends_recorded_data_have_the_bits_of_pycocotools(kind: str) -> None:
    case = data(kind)
    expected = expected_of(kind)
    assert 0.05 < expected[0][0] < 0.95
    for name in NAMES:
        if name == "auto" or is_installed(name):
            assert_equal(case, name, expected)


@pytest.mark.parametrize("name", NAMES)
def test_backends_limit_300_keeps_the_official_numbers(name: ApBackend) -> None:
    truth, _ = data("small")
    crowded = imperfect(truth, 400, seed=1)
    crowded.category_ids[:] = truth["categories"][0]["id"]  # more than 100 of one category in an image
    expected = reference(truth, crowded.to_results(), limits=(*LIMITS, 300))
    assert_equal((truth, crowded), installed(name), expected, limit=300)
    scores = coco_scores(truth, crowded, backend=name, limit=300)
    assert scores.metrics == coco_scores(truth, crowded, backend=name).metrics
    recall_at_300 = summarise(scores.arrays, len(LIMITS))["AR100"]
    assert recall_at_300 == reference(truth, crowded.to_results(), limits=(1, 10, 300))[0][8]
    assert recall_at_300 > scores.metrics["AR100"]


@pytest.mark.parametrize("name", NAMES)
def test_backends_perfect_detector_scores_one(name: ApBackend) -> None:
    for kind in ("small", "real"):
        truth, _ = data(kind)
        metrics = coco_scores(truth, perfect(truth), backend=installed(name)).metrics
        assert metrics["AP"] == metrics["AP_small"] == metrics["AP_large"] == pytest.approx(1.0, abs=1e-12)
        below = {metric for metric, value in metrics.items() if value != pytest.approx(1.0, abs=1e-12)}
        assert below <= {"AR1", "AR10"}  # an image with more objects of a category than the limit


COORDINATES = st.sampled_from([0.0, 1.0, 2.0, 4.0, 8.0, 10.0, 31.0, 32.0, 33.0, 95.5, 96.0, 97.0, 0.1, 1e5, -4.0, 1e11])
BOXES = st.tuples(*[COORDINATES] * 4).map(list)
SCORES = st.sampled_from([0.0, -0.0, 0.5, 0.5000001, 1.0, -1.0]) | st.floats(0, 1, width=32)
IDS = st.integers(0, 20) | st.integers(0, 2**62)


@st.composite
def hard_cases(draw: st.DrawFn) -> Case:
    """Few distinct boxes and scores, so that almost everything ties; ids of any size; empty images and categories."""
    images = draw(st.lists(IDS, min_size=1, max_size=4, unique=True))
    categories = draw(st.lists(IDS, min_size=1, max_size=3, unique=True))
    boxes = draw(st.lists(BOXES, min_size=1, max_size=4))
    some_box = st.sampled_from(boxes) | BOXES
    objects = draw(
        st.lists(
            st.tuples(
                st.sampled_from(images),
                st.sampled_from(categories),
                some_box,
                st.none() | st.sampled_from([0.0, 1023.9, 1024.0, 9216.0, 1e10, 2e10]),
                st.sampled_from([0, 0, 0, 1]),
            ),
            max_size=8,
        )
    )
    found = draw(
        st.lists(st.tuples(st.sampled_from(images), st.sampled_from(categories), some_box, SCORES), max_size=14)
    )
    repeats = draw(st.sampled_from([1, 1, 1, 12]))  # more than the limits of 10 and 100
    found = [entry for entry in found for _ in range(repeats)]
    truth = {
        "images": [{"id": image} for image in images],
        "categories": [{"id": category, "name": str(category)} for category in categories],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3] if area is None else area,
                "iscrowd": crowd,
            }
            for number, (image, category, box, area, crowd) in enumerate(objects, start=1)
        ],
    }
    seen: dict[int, int] = {}
    orders = [seen.update({image: seen.get(image, -1) + 1}) or seen[image] for image, *_ in found]
    return truth, Detections(
        np.array([entry[0] for entry in found], np.int64),
        np.array(orders, np.int32),
        np.array([entry[1] for entry in found], np.int64),
        np.array([entry[2] for entry in found], np.float64).reshape(-1, 4),
        np.array([entry[3] for entry in found], np.float64),
    )


@settings(max_examples=150)
@given(hard_cases(), st.sampled_from([100, 300]))
def test_backends_hard_cases_have_the_bits_of_pycocotools(case: Case, limit: int) -> None:
    expected = reference(case[0], case[1].to_results(), limits=LIMITS if limit == 100 else (*LIMITS, limit))
    for name in NAMES:
        if name == "auto" or is_installed(name):
            assert_equal(case, name, expected, limit)


@settings(max_examples=20)
@given(hard_cases(), st.randoms(use_true_random=False))
def test_backends_order_of_images_changes_no_bit(case: Case, random: Any) -> None:
    truth, found = case
    rows = list(range(len(found)))
    random.shuffle(rows)
    mixed = found[np.array(rows, np.int64)]
    straight, shuffled = coco_scores(truth, found), coco_scores(truth, mixed)
    assert shuffled.arrays.differences(straight.arrays) == []


def ranks_scores(runtime: Runtime, cases: list[Case]) -> list[list[list[float]]]:
    """Of every case and way to deal the images, the numbers of every fast backend, and of pycocotools once."""
    numbers = []
    for truth, found in cases:
        images = np.unique(found.image_ids)
        places, last = np.arange(len(images)), runtime.world - 1
        few_each = np.minimum(places // 5, last)
        for owner in (places % runtime.world, last - places % runtime.world, few_each, np.full(len(images), last)):
            mine = found[np.isin(found.image_ids, images[owner == runtime.rank])]
            gathered = gather(mine[np.arange(len(mine))[::-1]], runtime)
            if gathered is not None:
                names = [n for n in NAMES if n == "auto" or (is_installed(n) and (owner is few_each or n != NAMES[1]))]
                numbers.append([list(coco_scores(truth, gathered, backend=n).metrics.values()) for n in names])
    return numbers


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_backends_ranks_with_uneven_and_empty_shares_change_no_digit(world: int, tmp_path: Path) -> None:
    cases = [data("official"), data("real")]
    expected = [expected_of(kind)[0] for kind in ("official", "real")]
    first, *others = [ranks_scores(single(), cases)] if world == 1 else run_ranks(ranks_scores, world, tmp_path, cases)
    assert others == [[]] * (world - 1)
    assert len(first) == 8
    assert all(numbers == expected[place // 4] for place, deal in enumerate(first) for numbers in deal)


def test_thresholds_are_those_of_pycocotools() -> None:
    from pycocotools.cocoeval import Params

    params = Params("bbox")
    assert params.iouThrs.tobytes() == IOU_THRESHOLDS.tobytes()
    assert params.recThrs.tobytes() == RECALL_THRESHOLDS.tobytes()
    assert tuple(params.maxDets) == LIMITS


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_coco_scores_not_finite_is_refused_before_any_backend(value: float) -> None:
    truth, found = data("small")
    found.scores[3] = value
    with pytest.raises(DetectionError):
        coco_scores(truth, found)


def test_load_backend_missing_package_is_an_error_and_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.backends.select.is_installed", lambda name: name == "pycocotools")
    assert load_backend("auto").package == "pycocotools"
    with pytest.raises(ConfigError, match=r"evaluation\.backend"):
        load_backend("vernier")


def test_coco_scores_no_detection_at_all_is_zero() -> None:
    truth, _ = data("small")
    for name in NAMES:
        if name == "auto" or is_installed(name):
            assert set(coco_scores(truth, concatenate([]), backend=name).metrics.values()) == {0.0}


class Panic(BaseException):
    """As a panic of Rust, which is no Exception."""


def test_coco_scores_failing_backend_falls_back_to_pycocotools(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    truth, found = data("small")
    expected = coco_scores(truth, found)

    def fail(self: Hotcoco, task: Task) -> Arrays:
        raise Panic("index out of bounds")

    monkeypatch.setattr(Hotcoco, "run", fail)
    scores = coco_scores(truth, found, backend="hotcoco")
    assert scores.arrays.differences(expected.arrays) == []
    assert scores.backend == "pycocotools"
    assert "index out of bounds" in caplog.text
