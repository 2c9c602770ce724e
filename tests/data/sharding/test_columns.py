"""The checks over all annotations agree with what training does to each image; records keep every number."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.records import clamp_boxes, usable_boxes
from pipeline.data.sharding.columns import Columns, is_id
from pipeline.data.sharding.rules import Findings, Rule

SIZES = {3: (48, 64), 5: (10, 10), 8: (480, 640)}  # (height, width)
CATEGORIES = {1: "person", 7: "kite"}
NUMBERS = st.integers(-70, 700) | st.floats(-70, 700) | st.sampled_from([0, 64.0, 48, 1e-9, -1e-9, 0.1 + 0.2])
ANNOTATIONS = st.builds(
    lambda image, category, bbox, crowd: {"image_id": image, "category_id": category, "bbox": bbox, "iscrowd": crowd},
    st.sampled_from(list(SIZES)),
    st.sampled_from(list(CATEGORIES)),
    st.lists(NUMBERS, min_size=4, max_size=4),
    st.sampled_from([0, 0, 0, 1]),
)


def collect(annotations: list[Any]) -> tuple[Columns, dict[Rule, int]]:
    columns, findings = Columns(), Findings()
    for position, annotation in enumerate(annotations, 1):
        columns.add(annotation, position, findings)
    columns.check(SIZES, CATEGORIES, findings)
    return columns, {rule: count for rule, count, _ in findings}


@settings(max_examples=200, deadline=None)
@given(st.lists(ANNOTATIONS, max_size=12))
def test_columns_findings_agree_with_training(annotations: list[dict[str, Any]]) -> None:
    annotations = [{"id": 100 - k, **annotation} for k, annotation in enumerate(annotations)]
    _, found = collect(annotations)
    kept = {
        image: len(usable_boxes([a for a in annotations if a["image_id"] == image], size)[0])
        for image, size in SIZES.items()
    }
    single = sum(not annotation["iscrowd"] for annotation in annotations)
    assert found.get(Rule.NO_AREA, 0) + found.get(Rule.OUTSIDE, 0) == single - sum(kept.values())
    assert found.get(Rule.EMPTY_IMAGE, 0) == sum(count == 0 for count in kept.values())
    assert found.get(Rule.CROWD_WITHOUT_RLE, 0) == len(annotations) - single


@settings(max_examples=100, deadline=None)
@given(st.lists(ANNOTATIONS, max_size=12), st.sampled_from([None, 1, 2]))
def test_records_keep_numbers_in_order_of_ids(annotations: list[dict[str, Any]], limit: int | None) -> None:
    annotations = [{"id": 100 - k, "area": 5, **annotation} for k, annotation in enumerate(annotations)]
    columns, _ = collect(annotations)
    records = list(columns.records(SIZES, limit))
    assert len(records) == (limit or len(SIZES))
    for (image, (height, width)), record in zip(SIZES.items(), records, strict=False):
        mine = sorted((a for a in annotations if a["image_id"] == image), key=lambda a: a["id"])
        wanted = [{key: value for key, value in a.items() if key != "image_id"} for a in mine]
        content = {"image_id": image, "height": height, "width": width, "annotations": wanted}
        assert record == json.dumps(content, separators=(",", ":"), sort_keys=True).encode()


def test_clamp_boxes_one_size_or_one_per_box() -> None:
    boxes = np.array([[-5, 2, 10, 4], [60, 40, 9, 9], [70, 0, 5, 5]], np.float32)
    corners, solid = clamp_boxes(boxes, np.array([48, 64], np.float32))
    np.testing.assert_array_equal(corners, [[0, 2, 5, 6], [60, 40, 64, 48], [64, 0, 64, 5]])
    assert solid.tolist() == [True, True, False]
    same = clamp_boxes(boxes, np.array([[48, 64]] * 3, np.float32))
    np.testing.assert_array_equal(same[0], corners)
    assert boxes[0, 0] == -5, "the argument is left alone"


def test_is_id_accepts_only_integers() -> None:
    assert [is_id(value) for value in (0, 7, 2**63 - 1)] == [True] * 3
    assert [is_id(value) for value in (-1, 2**63, True, 1.0, "1", None, float("nan"))] == [False] * 7
    assert not is_id(11, largest=10)


@pytest.mark.parametrize(
    ("change", "bbox"),
    [
        ({"attributes": {"occluded": False, "rotation": 90.0}}, [20.0, 5.0, 10.0, 30.0]),
        ({"attributes": {"rotation": "270"}, "segmentation": []}, [20.0, 5.0, 10.0, 30.0]),
        ({"attributes": {"rotation": 45}}, [10.858, 5.858, 28.284, 28.284]),
        ({"attributes": {"rotation": 360.0}}, [10, 15, 30, 10]),
        ({"attributes": {"rotation": 0.0}}, [10, 15, 30, 10]),
        ({"attributes": {"rotation": "left"}}, [10, 15, 30, 10]),
        ({"attributes": {"rotation": 45}, "segmentation": [[10, 15, 40, 15, 40, 25]]}, [10, 15, 30, 10]),
        ({"attributes": ["rotation"]}, [10, 15, 30, 10]),
    ],
)
def test_box_that_cvat_has_rotated_becomes_the_box_around_it(change: dict[str, Any], bbox: list[float]) -> None:
    annotation = {"id": 1, "image_id": 8, "category_id": 1, "bbox": [10, 15, 30, 10], "area": 300} | change
    columns, found = collect([annotation])
    (stored,) = json.loads(list(columns.records(SIZES, None))[2])["annotations"]
    assert stored["bbox"] == bbox
    assert stored["area"] == 300
    assert found.get(Rule.ROTATED_BOX, 0) == (bbox != [10, 15, 30, 10])


@pytest.mark.parametrize(
    ("boxes", "refused"),
    [
        ([[0.2, 0.3, 0.4, 0.5], [0, 0, 1, 1.005]], True),
        ([[0.2, 0.3, 0.4, 0.5], [0, 0, 0, 0]], True),
        ([[0.2, 0.3, 0.4, 0.5], [3, 3, 1, 1]], False),  # one tiny object at the corner
        ([[0, 0, 0, 0]], False),
    ],
)
def test_boxes_in_shares_of_the_image_are_refused(boxes: list[list[float]], refused: bool) -> None:
    found = collect([{"id": k, "image_id": 8, "category_id": 1, "bbox": bbox} for k, bbox in enumerate(boxes, 1)])[1]
    assert found.get(Rule.SHARES, 0) == refused
