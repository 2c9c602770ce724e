"""YOLO data sets with the quirks of the tools that write them."""

from itertools import pairwise
from pathlib import Path

import pytest
from support.layouts import CLASSES, draw_truth, expected, stored, write_darknet, write_ultralytics

from pipeline.data.importing.build import build_dataset
from pipeline.data.importing.dataset import Options, read_dataset
from pipeline.data.sharding.rules import Rule
from pipeline.errors import AnnotationError

TRUTH = draw_truth({"train": 4, "val": 2})


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write_ultralytics(TRUTH, tmp_path / "export")
    return tmp_path / "export"


def counts(source: Path, **options: object) -> dict[str, int]:
    found = read_dataset(str(source), Options(**options))  # type: ignore[arg-type]
    return {split.name: len(split.samples) for split in found.splits}


@pytest.mark.parametrize(
    "settings",
    [
        "train: images/train\nval: images/val\ntest:\n",
        "path: ../datasets/things  # dataset root dir\ntrain: images/train\nval: images/val\n",
        "path: /home/me/datasets/things\ntrain: [images/train]\nval: [images/val]\n",
        "train: C:\\data\\things\\images\\train\nval: C:\\data\\things\\images\\val\n",
        "path: .\ntrain: ./images/train/\nval: ./images/val/\ndownload: |\n  import os\n",
        "train: train.txt\nval: lists/val.txt\n",
        "",
    ],
)
def test_paths_of_data_yaml(export: Path, settings: str) -> None:
    (export / "lists").mkdir()
    for split, scenes in TRUTH.items():
        lines = "".join(f"./images/{split}/{scene.name}\n" for scene in scenes)
        (export / "train.txt" if split == "train" else export / "lists/val.txt").write_text(lines)
    (export / "data.yaml").write_text(f"{settings}names: {list(CLASSES)}\n")
    assert counts(export) == {"train": 4, "val": 2}


def test_train_and_val_of_the_same_folder_are_duplicates(export: Path) -> None:
    (export / "data.yaml").write_text(f"train: images/train\nval: images/train\nnames: {list(CLASSES)}\n")
    found = read_dataset(str(export), Options(), decode=True)
    assert found.findings.count(Rule.EXACT_DUPLICATE) == 4
    assert found.splits[0].source.digest == found.splits[1].source.digest


def test_classes_txt_of_label_studio(tmp_path: Path, export: Path) -> None:
    (export / "data.yaml").unlink()
    (export / "classes.txt").write_text("\n".join(CLASSES) + "\n\n")
    (export / "notes.json").write_text('{"categories": [], "info": {}}')
    build_dataset(str(export), tmp_path / "out", Options())
    found = stored(tmp_path / "out/val")
    assert {data: [name for name, _ in boxes] for data, boxes in found.items()} == {
        data: [name for name, _ in boxes] for data, boxes in expected(TRUTH["val"]).items()
    }


def test_names_by_number_may_have_gaps(export: Path) -> None:
    (export / "data.yaml").write_text("train: images/train\nnames:\n  0: cell\n  1: dot\n  2: ring\n  7: more\n")
    found = read_dataset(str(export), Options(split=0))
    assert {category.id: category.name for category in found.splits[0].source.categories} == {
        1: "cell",
        2: "dot",
        3: "ring",
        8: "more",
    }


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("0 0.5 0.5 0.2 0.4", [0.4, 0.3, 0.2, 0.4]),
        ("0.0 0.5 0.5 0.2 0.4", [0.4, 0.3, 0.2, 0.4]),
        ("0 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7", [0.4, 0.3, 0.2, 0.4]),
        ("0\t0.4 0.3  0.6 0.5 0.5 0.7 ", [0.4, 0.3, 0.2, 0.4]),
    ],
)
def test_line_is_a_box_or_a_polygon(export: Path, line: str, box: list[float]) -> None:
    first = TRUTH["train"][0]
    (export / "labels/train" / f"{first.name[:-4]}.txt").write_text(f"\n{line}\n")
    image, _ = read_dataset(str(export), Options()).splits[0].samples[0]
    sides = [first.width, first.height] * 2
    assert image.annotations[0]["bbox"] == pytest.approx([a * b for a, b in zip(box, sides, strict=True)], abs=1e-3)


def test_key_points_follow_a_box(export: Path) -> None:
    with (export / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 3]\n")
    for path in (export / "labels").rglob("*.txt"):
        path.write_text("1 0.5 0.5 0.2 0.4 0.4 0.4 2 0.6 1.7 0\n")
    image, _ = read_dataset(str(export), Options()).splits[0].samples[0]
    assert [annotation["category_id"] for annotation in image.annotations] == [2]


def test_images_that_cannot_be_read_are_findings_and_not_left_out(tmp_path: Path) -> None:
    write_darknet(TRUTH, tmp_path / "export")
    first = tmp_path / "export/obj_train_data" / TRUTH["train"][0].name
    first.rename(first.with_suffix(".heic"))
    lists = tmp_path / "export/train.txt"
    lists.write_text(lists.read_text().replace(first.name, first.with_suffix(".heic").name))
    first.with_suffix(".heic").write_bytes(b"\0\0\0\x18ftypheic")
    found = {rule: examples for rule, _, examples in read_dataset(str(tmp_path / "export"), Options()).findings}
    assert "obj_train_data/pic 001.heic is neither JPEG nor PNG" in found[Rule.UNREADABLE_FILE][0]


@pytest.mark.parametrize(
    "key", ["names: [*i]", "names: {0: *i}", "train: *i\nnames: [a]", "path: *i\nnames: [a]", "nc: *i\nnames: [a]"]
)
def test_nested_lists_of_a_hostile_data_yaml_are_not_written_out(export: Path, key: str) -> None:
    lists = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, after in pairwise("abcdefghi"):
        lists.append(f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]")
    (export / "data.yaml").write_text("\n".join([*lists, key]))
    message = ""
    try:
        read_dataset(str(export), Options())
    except AnnotationError as error:
        message = str(error)
    assert len(message) < 10_000


def test_split_without_labels_is_a_finding(export: Path) -> None:
    for path in (export / "labels/val").iterdir():
        path.unlink()
    found = {rule: examples for rule, _, examples in read_dataset(str(export), Options()).findings}
    assert found[Rule.EMPTY_LABELS] == ["val"]


def test_two_data_sets_in_one_folder_are_refused(tmp_path: Path, export: Path) -> None:
    write_ultralytics(TRUTH, tmp_path / "both/one")
    export.rename(tmp_path / "both/two")
    with pytest.raises(AnnotationError, match=r"one/data.yaml and two/data.yaml"):
        read_dataset(str(tmp_path / "both"), Options())


def test_class_names_are_read_as_they_are_written(export: Path) -> None:
    names = "names:\n  0: no\n  1: on  # and off\n  2: 1.10\n  3: '007'\nnc: 4\n"
    (export / "data.yaml").write_text(f"train: images/train\nval: images/val\ntest: ~\n{names}")
    found = read_dataset(str(export), Options())
    assert [category.name for category in found.splits[0].source.categories] == ["no", "on", "1.10", "007"]


def test_list_of_classes_in_each_folder_of_labels_is_one_if_it_is_the_same(tmp_path: Path, export: Path) -> None:
    (export / "data.yaml").unlink()
    for split in ("train", "val"):
        (export / f"labels/{split}/classes.txt").write_text("\n".join(CLASSES) + "\n")
    assert counts(export) == {"train": 4, "val": 2}
    (export / "labels/val/classes.txt").write_text("\n".join(reversed(CLASSES)))
    with pytest.raises(AnnotationError, match=r"labels/train/classes.txt and labels/val/classes.txt; .* same classes"):
        counts(export)


def test_labels_in_utf_16_are_read_as_all_others(tmp_path: Path, export: Path) -> None:
    for label in export.rglob("*.txt"):
        label.write_bytes(label.read_text().encode("utf-16"))
    build_dataset(str(export), tmp_path / "out", Options())
    write_ultralytics(TRUTH, tmp_path / "other")
    build_dataset(str(tmp_path / "other"), tmp_path / "plain", Options())
    assert stored(tmp_path / "out/train") == stored(tmp_path / "plain/train")
