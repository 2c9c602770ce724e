"""The detections of an image as arrays, and their conversions."""

import json
import sys
from dataclasses import FrozenInstanceError, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.inference.detections import ImageDetections

BOXES = np.array([[0.1, 0.2, 10.3, 20.7], [5, 6, 7, 8]], np.float32)


@pytest.fixture
def found() -> ImageDetections:
    scores, ids = np.array([0.9, 0.3], np.float32), np.array([30, 10], np.int64)
    return ImageDetections(BOXES, scores, ids, ("ring", "disc"), (48, 64))


def nothing() -> ImageDetections:
    return ImageDetections(BOXES[:0], np.zeros(0, np.float32), np.zeros(0, np.int64), (), (48, 64))


def test_detections_are_frozen_and_have_a_length(found: ImageDetections) -> None:
    assert (len(found), len(nothing())) == (2, 0)
    with pytest.raises(FrozenInstanceError):
        found.size = (1, 1)  # type: ignore[misc]


def test_to_dict_is_json_and_loses_no_bit(found: ImageDetections) -> None:
    read = json.loads(json.dumps(found.to_dict()))
    boxes = np.array(read["boxes"])
    assert np.array_equal(boxes[:, :2] + boxes[:, 2:], BOXES[:, 2:].astype(float))
    assert np.array_equal(np.array(read["scores"], np.float32), found.scores)
    assert (read["labels"], read["category_ids"]) == (["ring", "disc"], [30, 10])
    assert nothing().to_dict() == {"boxes": [], "scores": [], "labels": [], "category_ids": []}


def test_to_coco_is_a_results_file(found: ImageDetections) -> None:
    plain = found.to_dict()
    assert found.to_coco(139) == [
        {"image_id": 139, "category_id": 30, "bbox": plain["boxes"][0], "score": plain["scores"][0]},
        {"image_id": 139, "category_id": 10, "bbox": [5.0, 6.0, 2.0, 2.0], "score": plain["scores"][1]},
    ]
    json.dumps(found.to_coco(139))
    assert nothing().to_coco(1) == []


@dataclass
class Arguments:
    """What `supervision.Detections` is given; the same fields as of 0.31."""

    xyxy: Any
    confidence: Any
    class_id: Any
    data: Any


def test_to_supervision_gives_arrays_of_its_own(found: ImageDetections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=Arguments))
    given: Any = found.to_supervision()
    assert np.array_equal(given.xyxy, BOXES)
    assert np.array_equal(given.confidence, found.scores)
    assert (given.class_id.tolist(), given.data["class_name"].tolist()) == ([30, 10], ["ring", "disc"])
    given.xyxy += 1
    given.confidence[:] = 0
    assert np.array_equal(found.boxes_xyxy, BOXES)
    assert found.scores.all()
    assert nothing().to_supervision().xyxy.shape == (0, 4)


def test_to_supervision_of_the_installed_package(found: ImageDetections) -> None:
    supervision = pytest.importorskip("supervision", reason="the package supervision is not installed")
    for one in (found, nothing()):
        converted = one.to_supervision()
        assert isinstance(converted, supervision.Detections)
        assert len(converted[converted.confidence > 0.5]) == (len(one) > 0)


def test_to_supervision_absent_package_says_how_to_install_it(
    found: ImageDetections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match="pip install supervision"):
        found.to_supervision()
