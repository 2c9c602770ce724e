"""Pascal VOC with the quirks of the tools that write it."""

import shutil
from pathlib import Path

import pytest
from support.layouts import draw_truth, expected, stored, write_roboflow_voc, write_voc_kit

from pipeline.data.importing.build import build_dataset
from pipeline.data.importing.dataset import Options, read_dataset
from pipeline.data.sharding.rules import Rule

TRUTH = draw_truth({"train": 3, "val": 2})


@pytest.mark.parametrize("first", [0, 1])
def test_coordinates_count_from_0_if_one_is_0(tmp_path: Path, first: int) -> None:
    (write_voc_kit if first else write_roboflow_voc)(TRUTH, tmp_path / "export")
    found = read_dataset(str(tmp_path / "export"), Options())
    assert found.findings.count(Rule.COUNTS_FROM_0) == 1 - first
    boxes = [[entry["bbox"] for entry in image.annotations] for image, _ in found.splits[0].samples]
    assert boxes == [[[x0, y0, x1 - x0, y1 - y0] for _, (x0, y0, x1, y1) in scene.boxes] for scene in TRUTH["train"]]


def test_masks_of_the_same_stem_are_not_taken_for_images(tmp_path: Path) -> None:
    write_voc_kit(TRUTH, tmp_path / "export")
    masks = tmp_path / "export/SegmentationClass"
    masks.mkdir()
    for scene in TRUTH["train"]:
        (masks / f"{scene.name[:-4]}.png").write_bytes(scene.data)
    (tmp_path / "export/JPEGImages/pic 003.png").rename(tmp_path / "export/JPEGImages/pic 003.jpeg")
    page = tmp_path / "export/Annotations/pic 003.xml"
    page.write_text(page.read_text().replace("pic 003.png", "pic 003.jpeg"))
    build_dataset(str(tmp_path / "export"), tmp_path / "out", Options())
    assert stored(tmp_path / "out/train") == expected(TRUTH["train"])


def test_size_of_0_is_that_of_the_file(tmp_path: Path) -> None:
    write_voc_kit(TRUTH, tmp_path / "export")
    for page in (tmp_path / "export/Annotations").iterdir():
        page.write_text(page.read_text().replace("<width>", "<width>0</width><more>").replace("</more>", ""))
        page.write_text(page.read_text().replace("<more>", "<was>", 1).replace("</width><height>", "</was><height>"))
    found = read_dataset(str(tmp_path / "export"), Options())
    assert not found.findings.refused()
    assert [(image.width, image.height) for image, _ in found.splits[0].samples] == [
        (scene.width, scene.height) for scene in TRUTH["train"]
    ]


def test_page_in_utf_16_is_read_as_all_others(tmp_path: Path) -> None:
    write_voc_kit(TRUTH, tmp_path / "export")
    page = tmp_path / "export/Annotations/pic 003.xml"
    page.write_bytes(f'<?xml version="1.0" encoding="utf-16"?>{page.read_text()}'.encode("utf-16"))
    build_dataset(str(tmp_path / "export"), tmp_path / "out", Options())
    assert stored(tmp_path / "out/train") == expected(TRUTH["train"])


@pytest.mark.parametrize("name", ["default", "trainval"])
def test_list_without_a_split_is_the_whole_set(tmp_path: Path, name: str) -> None:
    write_voc_kit(draw_truth({"train": 20}), tmp_path / "export")
    lists = tmp_path / "export/ImageSets/Main"
    (lists / "train.txt").rename(lists / f"{name}.txt")
    assert [split.name for split in read_dataset(str(tmp_path / "export"), Options()).splits] == [
        "train",
        "val",
        "test",
    ]


def test_trainval_beside_test_alone_is_train(tmp_path: Path) -> None:
    write_voc_kit(draw_truth({"train": 20, "test": 4}), tmp_path / "export")
    lists = tmp_path / "export/ImageSets/Main"
    shutil.copy(lists / "train.txt", lists / "trainval.txt")
    before = read_dataset(str(tmp_path / "export"), Options())
    (lists / "train.txt").unlink()
    after = read_dataset(str(tmp_path / "export"), Options())
    assert [split.name for split in after.splits] == ["train", "val", "test"]
    assert [split.samples for split in after.splits] == [split.samples for split in before.splits]


def test_renamed_image_is_found_by_the_name_of_its_label(tmp_path: Path) -> None:
    write_roboflow_voc(TRUTH, tmp_path / "export")
    for path in (tmp_path / "export").rglob("*.xml"):
        path.write_text(path.read_text().replace("<filename>pic", "<filename>DSC"))
    assert not read_dataset(str(tmp_path / "export"), Options()).findings.refused()


def test_box_that_cvat_has_rotated_becomes_the_box_around_it(tmp_path: Path) -> None:
    write_voc_kit(TRUTH, tmp_path / "export")
    page = min((tmp_path / "export/Annotations").iterdir())
    attribute = "<attribute><name>rotation</name><value>90.0</value></attribute>"
    text = page.read_text().replace("</object>", f"<attributes>{attribute}</attributes></object>", 1)
    page.write_text(text)
    found = read_dataset(str(tmp_path / "export"), Options())
    assert found.findings.count(Rule.ROTATED_BOX) == 1
    (first, *others), (_, (x0, y0, x1, y1)) = found.splits[0].samples[0][0].annotations, TRUTH["train"][0].boxes[0]
    x, y, width, height = first["bbox"]
    assert (x + width / 2, y + height / 2) == ((x0 + x1) / 2, (y0 + y1) / 2)
    assert (width, height) == (y1 - y0, x1 - x0)
    assert len(others) == len(TRUTH["train"][0].boxes) - 1
