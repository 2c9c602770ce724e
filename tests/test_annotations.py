"""Every fault of an annotation file is named with its count and first examples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import CATEGORIES, edit, write_coco

from pipeline.data.annotations import read_coco, usable_boxes
from pipeline.errors import AnnotationError


def test_reads_in_ascending_order_and_keeps_only_crowd_segmentation(tmp_path: Path) -> None:
    source = read_coco(write_coco(tmp_path)[0])
    assert [c.id for c in source.categories] == [1, 13, 90]
    assert [image.id for image in source.images] == sorted(image.id for image in source.images)
    assert [("segmentation" in a) for a in source.images[0].annotations] == [False, False, False, True]
    assert source.images[0].annotations[1]["bbox"] == [55, -3, 20, 15], "raw boxes are not clamped"


def test_limit_keeps_the_first_images_by_id(tmp_path: Path) -> None:
    assert [image.id for image in read_coco(write_coco(tmp_path)[0], limit=3).images] == [3, 10, 17]


def test_own_data_without_area_and_iscrowd(tmp_path: Path) -> None:
    path = write_coco(tmp_path)[0]
    edit(path, {"annotations": [{"id": 0, "image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4]}]})
    (kept,) = read_coco(path).images[0].annotations
    assert (kept["area"], kept["iscrowd"]) == (12.0, 0)


def test_usable_boxes_are_clamped_solid_and_not_crowd(tmp_path: Path) -> None:
    image = read_coco(write_coco(tmp_path)[0]).images[0]
    boxes, categories = usable_boxes(image.annotations, (image.height, image.width))
    np.testing.assert_array_equal(boxes, [[4, 6, 16.5, 16], [55, 0, 64, 12]])
    assert boxes.dtype == np.float32
    assert categories == [13, 90]
    assert usable_boxes([], (5, 5))[0].shape == (0, 4)


def _annotation(**change: Any) -> dict[str, Any]:
    return {"annotations": [{"id": 7, "image_id": 3, "category_id": 1, "bbox": [0, 0, 2, 2]} | change]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "lists no images"),
        ({"categories": []}, "lists no categories"),
        ({"annotations": {}}, "has no list of annotations"),
        ({"images": [{"id": 1}]}, "not a COCO annotation file: KeyError 'file_name'"),
        (_annotation(category_id=2), r"1 faulty annotation: annotation 7 \(image 3\) has category 2, which does not"),
        (_annotation(image_id=4), "annotation 7 is for image 4, which is not listed"),
        (_annotation(bbox=[1, 2, 3]), "not four finite numbers"),
        (_annotation(bbox=[1, 2, float("nan"), 4]), "not four finite numbers"),
        (_annotation(bbox=None), "is not a COCO annotation file"),
        (_annotation(id="x"), "id 'x' must be a whole number"),
        ({"images": [{"id": 10**12, "file_name": "x.jpg", "width": 1, "height": 1}]}, "more than 12 digits"),
        ({"categories": [*CATEGORIES, CATEGORIES[0]]}, "1 repeated category id: 90"),
        ({"annotations": _annotation()["annotations"] * 3}, "2 repeated annotation ids: 7; 7"),
        ({"images": [{"id": 3, "file_name": "../x.jpg", "width": 1, "height": 1}]}, "leaves the image folder"),
        ({"images": [{"id": 3, "file_name": "/etc/x.jpg", "width": 1, "height": 1}]}, "leaves the image folder"),
        ({"images": [{"id": 3, "file_name": "x.jpg", "width": 0, "height": 1}]}, "not positive whole numbers"),
    ],
)
def test_faults(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_coco(tmp_path)[0]
    if "images" in change:
        edit(path, {"annotations": []})
    edit(path, change)
    with pytest.raises(AnnotationError, match=message):
        read_coco(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "null", "{", "[" * 100_000, "\x00"])
def test_not_coco_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(AnnotationError, match=r"a.json is not"):
        read_coco(path)
    with pytest.raises(AnnotationError, match="cannot read"):
        read_coco(tmp_path / "none.json")


def test_many_faults_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    path = write_coco(tmp_path)[0]
    bad = [{**a, "category_id": 5} for a in json.loads(path.read_text())["annotations"]]
    edit(path, {"annotations": bad})
    with pytest.raises(
        AnnotationError, match=rf"{len(bad)} faulty annotations: annotation 1 .*and {len(bad) - 5} more"
    ):
        read_coco(path)
