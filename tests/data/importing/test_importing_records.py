"""Images are found by the names in label files; one of the same name elsewhere is not taken for a missing one."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.data.importing.dataset import Options, read_dataset
from pipeline.data.importing.records import Finder
from pipeline.data.importing.tree import open_tree
from pipeline.data.sharding.rules import Rule

BOX = [1, 2, 30, 20]


def write_coco(root: Path, labels: Mapping[str, str]) -> None:
    """Image entries by the path that is written; one box each. The label files of the other layouts do not matter."""
    size = {"width": 64, "height": 48}
    images = [{"id": number, "file_name": path} | size for number, path in enumerate(labels.values(), 1)]
    boxes = [{"id": one["id"], "image_id": one["id"], "category_id": 1, "bbox": BOX} for one in images]
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
    (root / "labels.json").write_text(json.dumps(document))


def write_voc(root: Path, labels: Mapping[str, str]) -> None:
    corners = "<xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax>"
    for name, path in labels.items():
        page = f"<annotation><filename>{path.rpartition('/')[2]}</filename><object><name>cell</name><bndbox>{corners}"
        _write(root / f"{name}.xml", f"{page}</bndbox></object></annotation>")


def write_labelme(root: Path, labels: Mapping[str, str]) -> None:
    shape = {"label": "cell", "points": [[1, 2], [30, 20]], "shape_type": "rectangle"}
    for name, path in labels.items():
        document: dict[str, Any] = {"shapes": [shape], "imagePath": path.rpartition("/")[2]}
        _write(root / f"{name}.json", json.dumps(document))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def draw(root: Path, *names: str) -> None:
    for shade, name in enumerate(names, start=1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (shade * 20, 0, 0)).save(root / name)


@pytest.mark.parametrize("write", [write_coco, write_voc, write_labelme])
def test_missing_image_is_not_replaced_by_one_of_the_same_name_in_another_folder(
    tmp_path: Path, write: Callable[[Path, Mapping[str, str]], None]
) -> None:
    draw(tmp_path, "cam1/2.jpg", "cam2/1.jpg")
    write(tmp_path, {"cam1/1": "cam1/1.jpg", "cam1/2": "cam1/2.jpg"})
    findings = read_dataset(str(tmp_path), Options(split=0)).findings
    assert findings.count(Rule.MISSING_FILE) == 1, findings.table()
    assert "1.jpg" in findings.refused()[0]


@pytest.mark.parametrize("write", [write_coco, write_voc, write_labelme])
def test_images_of_one_name_that_lost_their_folders_are_refused(
    tmp_path: Path, write: Callable[[Path, Mapping[str, str]], None]
) -> None:
    draw(tmp_path, "flat/1.jpg", "flat/2.jpg")
    labels = {"labels/cam1/1": "cam1/1.jpg", "labels/cam2/1": "cam2/1.jpg", "labels/cam2/2": "cam2/2.jpg"}
    write(tmp_path, labels)
    findings = read_dataset(str(tmp_path), Options(split=0)).findings
    assert findings.count(Rule.SHARED_IMAGE) == 1, findings.table()
    assert "flat/1.jpg" in findings.refused()[0]


@pytest.mark.parametrize(
    ("written", "source", "image"),
    [
        ("1.jpg", "labels.json", "cam1/1.jpg"),
        ("cam1/1.jpg", "labels.json", "cam1/1.jpg"),
        ("C:\\me\\cam1\\1.jpg", "labels.json", "cam1/1.jpg"),
        ("/data/old/1.jpg", "labels.json", "cam1/1.jpg"),  # a folder that is nowhere says nothing
        ("old/2.jpg", "labels.json", "cam2/deep/2.jpg"),
        ("deep/2.jpg", "labels.json", "cam2/deep/2.jpg"),
        ("cam2/1.jpg", "labels.json", "cam1/1.jpg"),  # `cam2` itself has no image
        ("cam2/2.jpg", "labels.json", "cam2/deep/2.jpg"),
        ("cam2/deep/1.jpg", "labels.json", None),
        ("1.jpg", "pages/1.xml", "cam1/1.jpg"),
        ("1.jpg", "cam2/deep/1.xml", None),  # 2.xml is beside its image, so 1.xml would be too
        ("2.jpg", "cam2/1.xml", "cam2/deep/2.jpg"),
        ("1.jpg", "cam2/deep/labels.json", "cam1/1.jpg"),
    ],
)
def test_finder_takes_an_image_of_another_folder_only_if_none_is_named(
    tmp_path: Path, written: str, source: str, image: str | None
) -> None:
    draw(tmp_path, "cam1/1.jpg", "cam2/deep/2.jpg")
    (tmp_path / "cam2/deep/2.xml").touch()
    assert Finder(open_tree(str(tmp_path))).named(written, source) == image


def test_path_with_and_without_its_folders_is_one_image_with_two_entries(tmp_path: Path) -> None:
    draw(tmp_path, "images/a b.jpg")
    write_coco(tmp_path, {"1": "/data/images/a b.jpg", "2": "images%2Fa%20b.jpg"})
    findings = read_dataset(str(tmp_path), Options(split=0)).findings
    assert not findings.refused()
    assert findings.count(Rule.REPEATED_FILE_NAME) == 1
