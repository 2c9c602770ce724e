"""COCO JSON with the quirks of the tools that write it."""

import json
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest
from support.data import edit
from support.layouts import CLASSES, draw_truth, expected, stored, write_coco_folders, write_label_studio_coco

from pipeline.data.importing.build import build_dataset
from pipeline.data.importing.classes import parse_choice
from pipeline.data.importing.dataset import Options, read_dataset
from pipeline.data.sharding.rules import Rule
from pipeline.errors import AnnotationError

TRUTH = draw_truth({"train": 3, "val": 2})
VAL = "annotations/instances_val2017.json"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write_coco_folders(TRUTH, tmp_path / "export")
    return tmp_path / "export"


def train_boxes(source: Path, out: Path) -> object:
    build_dataset(str(source), out, Options(split=0))
    return stored(out / "train")


@pytest.mark.parametrize("change", [lambda name: unicodedata.normalize("NFD", name), quote], ids=["NFD", "quoted"])
def test_file_names_decomposed_or_quoted_are_found(tmp_path: Path, change: object) -> None:
    write_label_studio_coco({"train": TRUTH["train"]}, tmp_path / "export")
    document = json.loads((tmp_path / "export/result.json").read_text())
    for image in document["images"]:
        new = image["file_name"].rpartition("\\")[2].replace("pic", "bäd")
        (tmp_path / "export/images" / new.replace("bäd", "pic")).rename(tmp_path / "export/images" / new)
        image["file_name"] = "upload/1/" + change(new)  # type: ignore[operator]
    edit(tmp_path / "export/result.json", document)
    assert train_boxes(tmp_path / "export", tmp_path / "out") == expected(TRUTH["train"])


def test_other_files_beside_are_left_alone(tmp_path: Path, export: Path) -> None:
    (export / "conf.yaml").write_text("a: !!python/object:x {}\n")
    (export / "notes.json").write_text('{"categories": [{"id": 0, "name": "x"}]}')
    (export / "list.json").write_text('[{"annotations": []}]')
    (export / "README.txt").write_text("x")
    assert train_boxes(export, tmp_path / "out") == expected(TRUTH["train"])


def test_image_of_another_split_with_the_same_name_is_not_used(export: Path) -> None:
    name = TRUTH["val"][0].name
    (export / "val2017" / name).rename(export / "train2017" / name)
    found = {rule: examples for rule, _, examples in read_dataset(str(export), Options()).findings}
    assert found[Rule.MISSING_FILE] == [f"{name} of annotations/instances_val2017.json"]


def test_image_in_the_folder_of_another_split_is_used_if_its_path_says_so(tmp_path: Path, export: Path) -> None:
    document = json.loads((export / VAL).read_text())
    for image in document["images"]:
        (export / "val2017" / image["file_name"]).rename(export / "train2017" / image["file_name"])
        image["file_name"] = f"train2017/{image['file_name']}"
    edit(export / VAL, document)
    build_dataset(str(export), tmp_path / "out", Options())
    assert stored(tmp_path / "out/val") == expected(TRUTH["val"])


def test_file_of_another_name_is_read_if_no_other_file_has_its_split(tmp_path: Path, export: Path) -> None:
    (export / VAL).rename(export / "annotations/val.json")
    assert (export / "annotations/captions_val2017.json").exists()
    build_dataset(str(export), tmp_path / "out", Options())
    assert stored(tmp_path / "out/val") == expected(TRUTH["val"])
    (export / "annotations/train.json").write_text((export / "annotations/val.json").read_text())
    build_dataset(str(export), tmp_path / "again", Options())
    assert stored(tmp_path / "again/train") == expected(TRUTH["train"])


def test_merged_class_that_one_split_does_not_list_is_kept(tmp_path: Path, export: Path) -> None:
    document = json.loads((export / VAL).read_text())
    for annotation in document["annotations"]:
        annotation["category_id"] = 2
    edit(export / VAL, document | {"categories": [{"id": 2, "name": "dot"}]})
    options = Options(classes=parse_choice(("cell,dot=thing",), "", ""))
    indexes = build_dataset(str(export), tmp_path / "out", options)
    assert [category.name for category in indexes["val"].categories] == ["thing", "ring"]
    assert {name for boxes in stored(tmp_path / "out/val").values() for name, _ in boxes} == {"thing"}


def test_class_name_twice_is_the_same_in_all_splits_or_an_error(export: Path) -> None:
    for path in (export / "annotations").glob("instances_*.json"):
        categories = json.loads(path.read_text())["categories"]
        edit(path, {"categories": [*categories, {"id": 9, "name": CLASSES[0]}]})
    found = read_dataset(str(export), Options())
    assert found.findings.count(Rule.REPEATED_NAME) == 2
    edit(export / VAL, {"categories": [{"id": 8, "name": CLASSES[0]}]})
    with pytest.raises(AnnotationError, match=r"instances_val2017.json"):
        read_dataset(str(export), Options())


def test_splits_of_the_same_images_have_the_same_source(tmp_path: Path) -> None:
    write_coco_folders({"train": TRUTH["train"]}, tmp_path / "export")
    text = (tmp_path / "export/annotations/instances_train2017.json").read_text()
    (tmp_path / "export/annotations/instances_val2017.json").write_text(text)
    (tmp_path / "export/train2017").rename(tmp_path / "export/all")
    indexes = build_dataset(str(tmp_path / "export"), tmp_path / "out", Options())
    assert indexes["train"].source_digest == indexes["val"].source_digest, "training warns by it"
    assert indexes["train"].shards[0].name != indexes["val"].shards[0].name, "caches go by names"
