"""Options of a data set: which splits are made, which classes are used; EXIF; images in other formats."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from support.data import contents, edit, with_orientation
from support.layouts import (
    CLASSES,
    LAYOUTS,
    draw_scene,
    draw_truth,
    expected,
    pack_tree,
    stored,
    write_label_studio_coco,
    write_roboflow_coco,
    write_roboflow_yolo,
    write_voc_kit,
)

from pipeline.data.importing.build import build_dataset
from pipeline.data.importing.classes import map_classes, parse_choice
from pipeline.data.importing.dataset import Options, read_dataset
from pipeline.data.sharding.rules import Rule
from pipeline.data.sharding.verify import verify_shards
from pipeline.errors import AnnotationError, ConfigError, ShardError


def sizes(source: Path, **options: object) -> dict[str, int]:
    found = read_dataset(str(source), Options(**options))  # type: ignore[arg-type]
    return {split.name: len(split.samples) for split in found.splits}


@pytest.mark.parametrize(
    ("present", "share", "found"),
    [
        ({"train": 40}, None, {"train": 32, "val": 4, "test": 4}),
        ({"train": 40}, 0.0, {"train": 40}),
        ({"train": 40}, 0.25, {"train": 20, "val": 10, "test": 10}),
        ({"train": 40, "val": 5}, None, {"train": 40, "val": 5}),
        ({"train": 40, "val": 5}, 0.1, {"train": 36, "val": 5, "test": 4}),
        ({"train": 40, "test": 5}, None, {"train": 36, "val": 4, "test": 5}),
        ({"train": 3}, None, {"train": 3}),
        ({"val": 5}, None, {"val": 5}),
    ],
)
def test_missing_splits_are_made_of_train(
    tmp_path: Path, present: dict[str, int], share: float | None, found: dict[str, int]
) -> None:
    write_roboflow_yolo(draw_truth(present), tmp_path / "export")
    assert sizes(tmp_path / "export", split=share) == found


def test_split_without_images_is_made_of_train_as_one_that_is_missing(tmp_path: Path) -> None:
    write_roboflow_coco(draw_truth({"train": 20, "val": 2, "test": 2}), tmp_path / "export")
    path = tmp_path / "export/valid/_annotations.coco.json"
    edit(path, {"images": [], "annotations": []})
    assert sizes(tmp_path / "export") == {"train": 18, "val": 2, "test": 2}


def test_class_that_no_training_image_has_is_a_finding_also_where_a_split_was_made(tmp_path: Path) -> None:
    write_roboflow_coco(draw_truth({"train": 20}), tmp_path / "export")
    found = read_dataset(str(tmp_path / "export"), Options())
    assert found.findings.count(Rule.NEVER_TRAINED) == 0
    made = next(split for split in found.splits if split.name == "val")
    kept = {image.file_name.rpartition("/")[2] for image, _ in made.samples}
    path = tmp_path / "export/train/_annotations.coco.json"
    tree = json.loads(path.read_text())
    ids = {entry["id"] for entry in tree["images"] if entry["file_name"] in kept}
    tree["categories"].append({"id": 99, "name": "rare"})
    for box in tree["annotations"]:
        box["category_id"] = 99 if box["image_id"] in ids else box["category_id"]
    path.write_text(json.dumps(tree))
    whole = read_dataset(str(tmp_path / "export"), Options())
    used = {split.name: split.used for split in whole.splits}
    assert whole.findings.count(Rule.NEVER_TRAINED) == len(frozenset().union(*used.values()) - used["train"])
    for split in whole.splits:
        assert split.used == {box["category_id"] for image, _ in split.samples for box in image.annotations}


def test_limit_is_of_each_split(tmp_path: Path) -> None:
    write_roboflow_coco(draw_truth(), tmp_path / "export")
    assert sizes(tmp_path / "export", limit=1) == {"train": 1, "val": 1, "test": 1}
    with pytest.raises(AnnotationError, match="--limit"):
        sizes(tmp_path / "export", limit=0)


@pytest.mark.parametrize(
    ("merge", "only", "exclude", "names"),
    [
        ((), "cell,ring", "", {1: "cell", 3: "ring"}),
        ((), "", "ring", {1: "cell", 2: "dot"}),
        (("cell,dot=thing",), "", "", {1: "thing", 3: "ring"}),
        (("dot,ring=cell",), "", "", {1: "cell"}),
        (("cell=ring",), "", "", {2: "dot", 3: "ring"}),
        (("cell,dot=a", "a,ring=b"), "", "", {1: "b"}),
        (("cell,dot=thing",), "thing", "", {1: "thing"}),
    ],
)
def test_map_classes(merge: tuple[str, ...], only: str, exclude: str, names: dict[int, str]) -> None:
    found = map_classes(dict(enumerate(CLASSES, start=1)), parse_choice(merge, only, exclude))
    assert found.names == names
    assert found.ids.keys() == {1, 2, 3}
    assert {new for new in found.ids.values() if new is not None} == names.keys()


@pytest.mark.parametrize(
    ("merge", "only", "exclude", "word"),
    [
        (("cel,dot=x",), "", "", "cell"),
        (("cell",), "", "", "--merge"),
        (("cell=",), "", "", "--merge"),
        ((), "dots", "", "'dot'"),
        ((), "", "rings", "'ring'"),
        ((), "", "cell,dot,ring", "no class"),
        (("cell,dot=x",), "cell", "", "--classes"),
    ],
)
def test_map_classes_wrong_name_is_refused(merge: tuple[str, ...], only: str, exclude: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        map_classes(dict(enumerate(CLASSES, start=1)), parse_choice(merge, only, exclude))


@pytest.mark.parametrize("layout", ["roboflow_coco", "ultralytics", "voc_kit", "labelme"])
def test_chosen_classes_are_those_of_the_shards(tmp_path: Path, layout: str) -> None:
    truth = draw_truth()
    LAYOUTS[layout](truth, tmp_path / "export")
    choice = parse_choice(("cell,dot=thing",), "", "ring")
    indexes = build_dataset(str(tmp_path / "export"), tmp_path / "out", Options(classes=choice, drop_unused=True))
    for split, scenes in truth.items():
        assert [category.name for category in indexes[split].categories] == ["thing"]
        found = [len(boxes) for _, boxes in sorted(stored(tmp_path / "out" / split).items())]
        kept = [[box for box in boxes if box[0] != "ring"] for _, boxes in sorted(expected(scenes).items())]
        assert found == [len(boxes) for boxes in kept]


def test_drop_unused_leaves_out_classes_without_a_box_in_any_split(tmp_path: Path) -> None:
    truth = draw_truth()
    write_roboflow_coco(truth, tmp_path / "export")
    found = read_dataset(str(tmp_path / "export"), Options())
    assert [category.name for category in found.splits[0].source.categories] == ["things", *CLASSES]
    assert found.findings.count(Rule.UNUSED_CATEGORY) == 1
    found = read_dataset(str(tmp_path / "export"), Options(drop_unused=True))
    assert all([category.name for category in split.source.categories] == [*CLASSES] for split in found.splits)
    assert (found.findings.count(Rule.UNUSED_CATEGORY), found.findings.count(Rule.DROPPED_CATEGORY)) == (0, 1)


def test_finished_splits_are_kept_and_other_options_are_refused(tmp_path: Path) -> None:
    write_roboflow_coco(draw_truth(), tmp_path / "export")
    build_dataset(str(tmp_path / "export"), tmp_path / "out", Options())
    before = contents(tmp_path / "out")
    build_dataset(str(pack_tree(tmp_path / "export", tmp_path / "x.zip")), tmp_path / "out", Options())
    assert contents(tmp_path / "out") == before
    with pytest.raises(ShardError, match=str(tmp_path / "out")):
        build_dataset(str(tmp_path / "export"), tmp_path / "out", Options(drop_unused=True))
    assert contents(tmp_path / "out") == before


def test_image_that_does_not_decode_leaves_no_index_in_any_split(tmp_path: Path) -> None:
    write_roboflow_coco(draw_truth(), tmp_path / "export")
    path = tmp_path / "export/valid/pic 007.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ShardError, match=r"valid/pic 007\.jpg"):
        build_dataset(str(tmp_path / "export"), tmp_path / "out", Options())
    assert not list((tmp_path / "out").rglob("index.json"))


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF"])
def test_images_of_other_formats_are_stored_as_png(tmp_path: Path, kind: str) -> None:
    truth = draw_truth({"train": 3, "val": 2})
    write_voc_kit(truth, tmp_path / "export")
    path = tmp_path / "export/JPEGImages/pic 001.jpg"
    pixels = Image.open(path).convert("RGB")
    changed = path.with_suffix(f".{kind.lower()}")
    pixels.save(changed, kind, **({"lossless": True} if kind == "WEBP" else {}))
    path.unlink()
    found = read_dataset(str(tmp_path / "export"), Options())
    assert found.findings.count(Rule.CONVERTED) == 1
    indexes = build_dataset(str(tmp_path / "export"), tmp_path / "out", Options(), mib_per_shard=1)
    assert len(indexes["train"].samples) == 3
    assert not verify_shards(str(tmp_path / "out/train"))
    (data,) = set(stored(tmp_path / "out/train")) - set(expected(truth["train"]))
    assert data.startswith(b"\x89PNG")
    assert list(Image.open(io.BytesIO(data)).get_flattened_data()) == list(pixels.get_flattened_data())
    assert stored(tmp_path / "out/train")[data] == expected(truth["train"])[truth["train"][0].data]
    before = contents(tmp_path / "out")
    build_dataset(str(tmp_path / "export"), tmp_path / "out", Options(), mib_per_shard=1)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(("exif", "size"), [("auto", (40, 70)), ("ignore", (70, 40))])
def test_yolo_shares_are_of_the_displayed_image(tmp_path: Path, exif: str, size: tuple[int, int]) -> None:
    write_roboflow_yolo({"train": [draw_scene("a.jpg", 1)]}, tmp_path / "export")
    rotated = with_orientation(Image.new("RGB", (70, 40)), 6)
    (tmp_path / "export/train/images/a.jpg").write_bytes(rotated)
    (tmp_path / "export/train/labels/a.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    found = read_dataset(str(tmp_path / "export"), Options(exif=exif, split=0))  # type: ignore[arg-type]
    ((image, _),) = found.splits[0].samples
    assert (image.width, image.height) == size
    assert image.orientation == (6 if exif == "auto" else 1)
    assert image.annotations[0]["bbox"] == [0.25 * size[0], 0, 0.5 * size[0], 0.5 * size[1]]


def test_label_studio_null_size_is_that_of_the_file(tmp_path: Path) -> None:
    truth = draw_truth({"train": 4})
    write_label_studio_coco(truth, tmp_path / "export")
    assert json.loads((tmp_path / "export/result.json").read_text())["images"][0]["width"] is None
    found = read_dataset(str(tmp_path / "export"), Options(split=0))
    assert [(image.width, image.height) for image, _ in found.splits[0].samples] == [
        (scene.width, scene.height) for scene in truth["train"]
    ]


def test_copies_in_two_splits_are_findings(tmp_path: Path) -> None:
    truth = draw_truth({"train": 8, "val": 3})
    write_roboflow_yolo(truth, tmp_path / "export")
    images = tmp_path / "export/valid/images"
    (images / "same.jpg").write_bytes(truth["train"][0].data)
    Image.open(io.BytesIO(truth["train"][1].data)).save(images / "again.jpg", quality=60)
    found = {
        rule: examples for rule, _, examples in read_dataset(str(tmp_path / "export"), Options(), decode=True).findings
    }
    assert found[Rule.EXACT_DUPLICATE] == ["valid/images/same.jpg and train/images/pic 001.jpg"]
    assert found[Rule.NEAR_DUPLICATE] == ["valid/images/again.jpg and train/images/pic 002.jpg"]
