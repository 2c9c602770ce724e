"""The 12 numbers are bit-equal to pycocotools', also for inputs where pycocotools alone fails."""

import contextlib
import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support.paths import ASSETS, SHARED

from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.errors import AnnotationError, DetectionError
from pipeline.evaluation.coco import METRICS, coco_ap, file_names, ground_truth, ground_truth_of_file
from pipeline.evaluation.detections import Detections, concatenate, from_results_json

SMALL = ASSETS / "coco_small"
OFFICIAL = SHARED / "coco_eval_fixture"
# pycocotools 2.0.11 on cocoapi's fake detections for 100 images of val2014.
OFFICIAL_NUMBERS = (
    *(0.5045806987249628, 0.6969727247299577, 0.5729816669904824),
    *(0.5856257209410443, 0.5193996948036719, 0.5013978986347466),
    *(0.38681277964578054, 0.5936795762842003, 0.595352982877607),
    *(0.6398109626113442, 0.5664205978994309, 0.5642905982905982),
)


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    return ground_truth_of_file(SMALL / "annotations.json")


@pytest.fixture(scope="module")
def found() -> Detections:
    return from_results_json(SMALL / "results.json")


def plain_pycocotools(tree: dict[str, Any], results: list[dict[str, Any]], images: list[int] | None = None) -> list:
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO()
        annotations.dataset = copy.deepcopy(tree)
        annotations.createIndex()
        evaluation = COCOeval(annotations, annotations.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.params.imgIds = images or evaluation.params.imgIds
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def perfect(truth: dict[str, Any]) -> Detections:
    kept = [a for a in truth["annotations"] if not a["iscrowd"]]
    rows = np.arange(len(kept))
    return Detections(
        np.array([a["image_id"] for a in kept]),
        rows.astype(np.int32),
        np.array([a["category_id"] for a in kept]),
        np.array([a["bbox"] for a in kept]),
        np.ones(len(kept)),
    )


def test_coco_ap_official_fixture_is_exact() -> None:
    if not OFFICIAL.is_dir():
        pytest.skip(f"{OFFICIAL} does not exist: cocoapi's fixture is not part of this repository")
    metrics = coco_ap(
        ground_truth_of_file(OFFICIAL / "instances_val2014_100.json"),
        from_results_json(OFFICIAL / "instances_val2014_fakebbox100_results.json"),
    )
    assert tuple(metrics) == METRICS
    assert tuple(metrics.values()) == OFFICIAL_NUMBERS


def test_coco_ap_own_fixture_is_exact(truth: dict[str, Any], found: Detections) -> None:
    assert coco_ap(truth, found) == json.loads((SMALL / "expected.json").read_text())


@pytest.mark.parametrize("seed", range(4))
def test_coco_ap_float32_is_bit_equal_to_pycocotools(truth: dict[str, Any], found: Detections, seed: int) -> None:
    rng = np.random.default_rng(seed)
    changed = replace(
        found,
        boxes_xywh=(found.boxes_xywh * rng.uniform(0.9, 1.1, found.boxes_xywh.shape)).astype(np.float32),
        scores=(found.scores * rng.choice([0.5, 0.75, 1.0], len(found))).astype(np.float32),  # many ties
    )
    results = changed.to_results()
    shuffled = changed[rng.permutation(len(changed))]  # as after a gather in any order
    assert list(coco_ap(truth, shuffled).values()) == plain_pycocotools(truth, results)


def test_coco_ap_subset_of_images_restricts_both_sides(truth: dict[str, Any], found: Detections) -> None:
    images = sorted({a["image_id"] for a in truth["annotations"]})[:7]
    inside = found[np.isin(found.image_ids, images)]
    numbers = list(coco_ap(truth, inside, images).values())
    assert numbers == plain_pycocotools(truth, inside.to_results(), images)
    smaller = {
        "images": [image for image in truth["images"] if image["id"] in images],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in images],
        "categories": truth["categories"],
    }
    assert numbers == list(coco_ap(smaller, inside).values())
    foreign = min(set(found.image_ids.tolist()) - set(images))
    with pytest.raises(DetectionError, match=rf"\b{foreign}\b"):
        coco_ap(truth, found, images)


def test_coco_ap_empty_result_is_zero_and_empty_truth_minus_one(truth: dict[str, Any]) -> None:
    assert set(coco_ap(truth, concatenate([])).values()) == {0.0}
    no_large = {**truth, "annotations": [a for a in truth["annotations"] if a["area"] < 96**2]}
    metrics = coco_ap(no_large, concatenate([]))
    assert {name for name, value in metrics.items() if value == -1} == {"AP_large", "AR_large"}
    assert set(metrics.values()) == {0.0, -1.0}
    bare = {**truth, "annotations": []}
    assert set(coco_ap(bare, concatenate([])).values()) == {-1.0}
    assert set(coco_ap(bare, perfect(truth)).values()) == {-1.0}


@pytest.mark.parametrize("first_id", [0, 1, 1000])
def test_coco_ap_perfect_detections_score_one_with_any_annotation_ids(truth: dict[str, Any], first_id: int) -> None:
    numbered = [{**a, "id": first_id + number} for number, a in enumerate(truth["annotations"])]
    metrics = coco_ap({**truth, "annotations": numbered}, perfect(truth))
    assert metrics["AP"] == metrics["AR100"] == metrics["AP_small"] == pytest.approx(1.0, abs=1e-12)


def test_coco_ap_detections_in_crowd_region_are_ignored(truth: dict[str, Any]) -> None:
    crowd = next(a for a in truth["annotations"] if a["iscrowd"])
    x, y, w, h = crowd["bbox"]
    inside = Detections(
        np.full(3, crowd["image_id"]),
        np.arange(1000, 1003, dtype=np.int32),
        np.full(3, crowd["category_id"]),
        np.array([[x, y, w / 2, h / 2], [x + w / 3, y, w / 3, h], [x, y, w, h]]),
        np.full(3, 2.0),  # above every true find
    )
    assert coco_ap(truth, concatenate([perfect(truth), inside]))["AP"] == pytest.approx(1.0, abs=1e-12)


def test_coco_ap_prints_nothing_and_changes_no_argument(
    truth: dict[str, Any], found: Detections, capsys: pytest.CaptureFixture[str]
) -> None:
    before = copy.deepcopy(truth)
    coco_ap(truth, found)
    assert truth == before
    assert capsys.readouterr() == ("", "")


def test_ground_truth_of_shards_equals_that_of_the_file(tmp_path: Path) -> None:
    annotations, images = write_synthetic(tmp_path / "drawn", images=9, seed=2)
    build_shards(annotations, images, tmp_path / "shards", samples_per_shard=4)
    from_shards = ground_truth(str(tmp_path / "shards"))
    from_file = ground_truth_of_file(annotations)
    assert file_names(from_file)[3] == "000000000003.jpg"
    assert file_names(from_shards) == {}
    assert from_shards == from_file | {"images": [{"id": image["id"]} for image in from_file["images"]]}
    assert any(a["iscrowd"] for a in from_shards["annotations"])
    assert len(from_shards["images"]) == 9


@pytest.mark.parametrize(
    ("tree", "lists"),
    [
        ([], r"a\.json"),
        ({"images": [], "annotations": [], "categories": []}, r"\(2\): images, categories;"),
        ({"images": [{"id": 1}], "annotations": []}, "categories$"),
    ],
)
def test_ground_truth_of_file_wrong_file_raises(tmp_path: Path, tree: Any, lists: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(AnnotationError, match=lists):
        ground_truth_of_file(path)
