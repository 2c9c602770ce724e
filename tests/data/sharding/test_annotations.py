"""Every fault of an annotation file is named with its count and first examples."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.annotations import REFUSED, _annotation, _image
from support.data import CATEGORIES, RLE, edit, write_coco

from pipeline.data.records import usable_boxes
from pipeline.data.sharding.annotations import inspect_coco, read_coco
from pipeline.data.sharding.rules import Rule
from pipeline.errors import AnnotationError


def test_read_coco_sorts_by_id_and_keeps_crowd_segmentation(tmp_path: Path) -> None:
    source = read_coco(write_coco(tmp_path)[0])
    assert [c.id for c in source.categories] == [1, 13, 90]
    assert [image.id for image in source.images] == sorted(image.id for image in source.images)
    assert [("segmentation" in a) for a in source.images[0].annotations] == [False, False, False, True]
    assert source.images[0].annotations[1]["bbox"] == [55, -3, 20, 15], "raw boxes are not clamped"


def test_read_coco_limit_keeps_first_images(tmp_path: Path) -> None:
    assert [image.id for image in read_coco(write_coco(tmp_path)[0], limit=3).images] == [3, 10, 17]


def test_read_coco_without_area_and_iscrowd_adds_them(tmp_path: Path) -> None:
    path = write_coco(tmp_path)[0]
    edit(path, {"annotations": [{"id": 0, "image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4]}]})
    (kept,) = read_coco(path).images[0].annotations
    assert (kept["area"], kept["iscrowd"]) == (12.0, 0)


def test_usable_boxes_drops_crowd_and_empty_boxes(tmp_path: Path) -> None:
    image = read_coco(write_coco(tmp_path)[0]).images[0]
    boxes, categories = usable_boxes(image.annotations, (image.height, image.width))
    np.testing.assert_array_equal(boxes, [[4, 6, 16.5, 16], [55, 0, 64, 12]])
    assert boxes.dtype == np.float32
    assert categories == [13, 90]
    assert usable_boxes([], (5, 5))[0].shape == (0, 4)


@pytest.mark.parametrize(("change", "rule", "named"), REFUSED)
def test_read_coco_fault_is_refused(tmp_path: Path, change: dict[str, Any], rule: Rule, named: str) -> None:
    path = write_coco(tmp_path)[0]
    edit(path, {"images": _image()["images"], "annotations": [], "categories": CATEGORIES})
    edit(path, change)
    with pytest.raises(AnnotationError, match=rf"instances\.json[\s\S]*{re.escape(rule.what)}") as refused:
        read_coco(path)
    assert named in str(refused.value)


def test_read_coco_many_faults_come_in_one_message(tmp_path: Path) -> None:
    path = write_coco(tmp_path)[0]
    tree = json.loads(path.read_text())
    tree["annotations"][0]["category_id"] = 5
    tree["annotations"][1]["bbox"] = None
    tree["images"][2]["file_name"] = "/etc/passwd"
    path.write_text(json.dumps(tree))
    with pytest.raises(AnnotationError) as caught:
        read_coco(path)
    first, *faults = str(caught.value).splitlines()
    assert "python -m jobs.lint" in first
    assert [fault.split("(")[0].strip() for fault in faults] == [
        rule.what.split("(")[0].strip() for rule in (Rule.BAD_FILE_NAME, Rule.UNKNOWN_CATEGORY, Rule.BAD_BOX)
    ]


@pytest.mark.parametrize(
    ("change", "lists"),
    [
        ({"images": [], "annotations": []}, r"\(1\): images;"),
        ({"categories": [], "annotations": []}, r"\(1\): categories;"),
        ({"annotations": {}}, "annotations$"),
        ({"annotations": None, "images": 3}, "images, annotations$"),
    ],
)
def test_read_coco_empty_or_missing_list_is_refused(tmp_path: Path, change: dict[str, Any], lists: str) -> None:
    path = write_coco(tmp_path)[0]
    edit(path, change)
    with pytest.raises(AnnotationError, match=lists):
        read_coco(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "null", "{", "[" * 100_000, '{"images": ' + "[" * 100_000, "\x00"])
def test_read_coco_other_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(AnnotationError, match=r"a\.json"):
        read_coco(path)
    with pytest.raises(AnnotationError, match=r"none\.json"):
        read_coco(tmp_path / "none.json")
    with pytest.raises(AnnotationError, match=r"a\.json"):
        read_coco(tmp_path)


def test_read_coco_many_faults_are_counted(tmp_path: Path) -> None:
    path = write_coco(tmp_path)[0]
    bad = [{**a, "category_id": 5} for a in json.loads(path.read_text())["annotations"]]
    edit(path, {"annotations": bad})
    with pytest.raises(AnnotationError, match=rf"\({len(bad)}\): annotation 1 of image 3 .*, \.\.\.; "):
        read_coco(path)


def found(path: Path, change: dict[str, Any]) -> dict[Rule, tuple[int, list[str]]]:
    edit(path, change)
    return {rule: (count, examples) for rule, count, examples in inspect_coco(path)[1]}


def test_inspect_coco_unusual_entry_is_kept_with_finding(tmp_path: Path) -> None:
    path = write_coco(tmp_path)[0]
    entries: list[dict[str, Any]] = [
        {"id": 0, "category_id": 0, "bbox": [2, 2, 4, 4]},
        {"id": 1, "category_id": 0, "bbox": [-1, 2, 4, 4], "area": 0},
        {"id": 2, "category_id": 0, "bbox": [2, 2, 0, 4]},
        {"id": 3, "category_id": 0, "bbox": [2, 2, 4, -4]},
        {"id": 4, "category_id": 0, "bbox": [900, 2, 4, 4]},
        {"id": 5, "category_id": 4, "bbox": [2, 2, 4, 4], "iscrowd": 1, "segmentation": [[1, 2, 3, 4]]},
        {"id": 6, "category_id": 4, "bbox": [-2, 2, 4, 4], "iscrowd": 1, "segmentation": RLE},
    ]
    images = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in ((0, "x"), (5, "x"), (6, "y"))]
    categories = [{"id": i, "name": name} for i, name in ((0, "\u00e4"), (2, "a\u0308"), (4, "b"), (9, "c"))]
    change = {"images": images, "categories": categories}
    seen = found(path, change | {"annotations": [{"image_id": 0, **entry} for entry in entries]})
    assert seen == {
        Rule.NO_AREA: (2, ["annotation 2 of image 0", "annotation 3 of image 0"]),
        Rule.OUTSIDE: (1, ["annotation 4 of image 0"]),
        Rule.CROSSES_EDGE: (1, ["annotation 1 of image 0"]),
        Rule.CROWD: (1, ["annotation 6 of image 0"]),
        Rule.CROWD_WITHOUT_RLE: (1, ["annotation 5 of image 0"]),
        Rule.AREA_NOT_POSITIVE: (1, ["annotation 1 of image 0"]),
        Rule.ID_ZERO: (3, ["image id 0", "category id 0", "annotation id 0"]),
        Rule.REPEATED_FILE_NAME: (1, ["'x'"]),
        Rule.REPEATED_NAME: (1, ["'\u00e4'"]),
        Rule.EMPTY_IMAGE: (2, ["image 5", "image 6"]),
        Rule.UNUSED_CATEGORY: (3, ["2 (a\u0308)", "4 (b)", "9 (c)"]),
        Rule.CATEGORY_GAPS: (3, ["1", "3", "5 to 8"]),
    }
    assert [image.id for image in read_coco(path).images] == [0, 5, 6]


def test_inspect_coco_clean_file_has_no_findings(tmp_path: Path) -> None:
    path = write_coco(tmp_path, images=1)[0]
    annotations = [
        {"id": k, "image_id": 3, "category_id": k, "bbox": [0, 0, 64, 48.0], "area": 9, "iscrowd": 0} for k in (1, 2)
    ]
    assert found(path, {"annotations": annotations, "categories": [{"id": k, "name": f"n{k}"} for k in (1, 2)]}) == {}


def test_inspect_coco_quoted_number_is_read_with_finding(tmp_path: Path) -> None:
    path = write_coco(tmp_path)[0]
    entry = {"id": 7, "image_id": 3, "category_id": 1, "bbox": ["1", " 2.5 ", 3, "4e0"], "area": "12", "iscrowd": "0"}
    plain = {"id": 8, "image_id": 3, "category_id": 1, "bbox": [1, 2.5, 3, 4]}
    seen = found(path, {"annotations": [entry, plain]})
    assert seen[Rule.QUOTED_NUMBER] == (1, ["annotation 7 of image 3"])
    (kept, _) = read_coco(path).images[0].annotations
    assert kept == {"id": 7, "category_id": 1, "bbox": [1, 2.5, 3, 4.0], "area": 12, "iscrowd": 0}


CAUSES: list[tuple[dict[str, Any], Rule]] = [
    (_image(file_name="/home/me/x.jpg"), Rule.BAD_FILE_NAME),
    (_image(id="3"), Rule.BAD_ID),
    (_image(id=3.0), Rule.BAD_ID),
    (_image(id=-3), Rule.BAD_ID),
    (_image(width=9.0), Rule.BAD_SIZE),
    (_image(width=None), Rule.BAD_SIZE),
    ({"images": [{"id": 3, "file_name": "x.jpg"}]}, Rule.MALFORMED),
    ({"categories": [{"id": "1", "name": "person"}]}, Rule.BAD_ID),
    ({"categories": [{"id": 1}]}, Rule.MALFORMED),
    (_annotation(id="x"), Rule.BAD_ID),
    (_annotation(bbox=None), Rule.BAD_BOX),
    (_annotation(area="big"), Rule.BAD_AREA),
    (_annotation(iscrowd=7), Rule.BAD_CROWD),
    (_annotation(category_id=2), Rule.UNKNOWN_CATEGORY),
    (_annotation(category_id="dog"), Rule.UNKNOWN_CATEGORY),
    (_annotation(image_id=9), Rule.UNKNOWN_IMAGE),
    ({"annotations": [{"id": 7, "image_id": 3, "category_id": 1}]}, Rule.MALFORMED),
]


@pytest.mark.parametrize("like", [int, str, float])
@pytest.mark.parametrize(("change", "cause"), CAUSES)
def test_inspect_coco_consequence_of_refused_entry_is_no_finding(
    tmp_path: Path, change: dict[str, Any], cause: Rule, like: type
) -> None:
    """A data set of one image, category and annotation, with ids of the form `like` and one fault."""
    path = write_coco(tmp_path)[0]
    tree = {"categories": [{"id": 1, "name": "person"}], **_image(), **_annotation(), **change}
    for entry in tree["annotations"]:
        if cause is Rule.BAD_ID and "images" in change:
            entry["image_id"] = like(int(change["images"][0]["id"]))
        if cause is Rule.BAD_ID and "categories" in change:
            entry["category_id"] = like(int(change["categories"][0]["id"]))
    follows = {Rule.EMPTY_IMAGE} if cause is Rule.UNKNOWN_IMAGE else set()  # that image has no box, listed or not
    follows |= {Rule.UNUSED_CATEGORY} if cause is Rule.UNKNOWN_CATEGORY else set()
    assert set(found(path, tree)) == {cause} | follows


def test_inspect_coco_unlisted_id_beside_refused_is_finding(tmp_path: Path) -> None:
    path = write_coco(tmp_path)[0]
    entries = [_annotation(id=k, image_id=image)["annotations"][0] for k, image in enumerate(("3", "4", 4, 3), 1)]
    seen = found(path, {**_image(id="3"), "annotations": entries, "categories": CATEGORIES})
    assert seen[Rule.UNKNOWN_IMAGE] == (2, ["annotation 2 of image '4' (image_id '4')", "annotation 3 of image 4"])


@pytest.mark.parametrize(
    "files", [("index.json", r"jobs\.shard info"), ("b.json", r"b\.json"), ("x.txt", "ANNOTATIONS")]
)
def test_read_coco_folder_names_json_file(tmp_path: Path, files: tuple[str, str]) -> None:
    (tmp_path / files[0]).write_text("{}")
    with pytest.raises(AnnotationError, match=rf"{tmp_path}.*{files[1]}"):
        read_coco(tmp_path)
