"""The synthetic data set: deterministic, COCO-format as pycocotools reads it, and as hard as the demo promises."""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic
from pipeline.errors import InputError


def digest(out: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file():
            total.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    annotations, images = write_synthetic(tmp_path_factory.mktemp("drawn"), images=60, seed=5)
    return json.loads(annotations.read_text()), images


def test_write_synthetic_seed_decides_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_synthetic(tmp_path / name, images=9, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_write_synthetic_areas_are_exact_so_that_processors_agree(drawn: tuple[dict, Path]) -> None:
    polygons = [each for each in drawn[0]["annotations"] if not each["iscrowd"]]
    assert len(polygons) > 100
    for annotation in polygons:
        numbers = [Fraction(str(number)) for number in annotation["segmentation"][0]]
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        edges = zip(points, points[1:] + points[:1], strict=True)
        assert annotation["area"] == float(abs(sum(a[0] * b[1] - a[1] * b[0] for a, b in edges)) / 2)


@pytest.mark.parametrize("content", ['{"info": {}}', '{"info": {"description": "mine"}}', "not JSON", "[]", None])
def test_write_synthetic_foreign_data_is_refused(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000000001.jpg").write_text("mine")
    if content is not None:
        (tmp_path / "annotations.json").write_text(content)
    before = digest(tmp_path)
    with pytest.raises(InputError, match=str(tmp_path)):
        write_synthetic(tmp_path, images=1, seed=0)
    assert digest(tmp_path) == before


def test_write_synthetic_after_kill_writes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.sharding.synthetic._backdrop", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_synthetic(tmp_path / "a", images=1, seed=1)
    for name in ("a", "b"):
        write_synthetic(tmp_path / name, images=2, seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_write_synthetic_longer_set_begins_with_shorter(tmp_path: Path) -> None:
    short, long = (json.loads(write_synthetic(tmp_path / str(n), images=n, seed=3)[0].read_text()) for n in (4, 9))
    assert long["images"][:4] == short["images"]
    assert long["annotations"][: len(short["annotations"])] == short["annotations"]


def test_write_synthetic_files_ids_and_sizes_agree(drawn: tuple[dict, Path]) -> None:
    tree, folder = drawn
    ids = [image["id"] for image in tree["images"]]
    assert ids == sorted(set(ids))
    assert ids != list(range(ids[0], ids[0] + len(ids)))
    for image in tree["images"]:
        assert image["file_name"] == f"{image['id']:012d}.jpg"
        with Image.open(folder / image["file_name"]) as opened:
            assert opened.format == "JPEG"
            assert opened.size == (image["width"], image["height"])
            assert 128 <= min(opened.size) <= max(opened.size) <= 192
    assert len({(image["width"], image["height"]) for image in tree["images"]}) > 30
    assert [annotation["id"] for annotation in tree["annotations"]] == list(range(1, len(tree["annotations"]) + 1))
    assert {c["id"]: c["name"] for c in tree["categories"]} == CATEGORIES
    assert len(CATEGORIES) >= 5
    assert sorted(CATEGORIES) != list(range(1, len(CATEGORIES) + 1))


def test_write_synthetic_first_eight_have_all_kinds(drawn: tuple[dict, Path]) -> None:
    tree, folder = drawn
    first = tree["images"][:8]
    modes = set()
    for image in first:
        with Image.open(folder / image["file_name"]) as opened:
            modes.add(opened.mode)
    assert modes == {"L", "RGB"}
    owners = {a["image_id"] for a in tree["annotations"]}
    assert any(image["id"] not in owners for image in first)
    crowds = {a["image_id"] for a in tree["annotations"] if a["iscrowd"]}
    assert any(image["id"] in crowds for image in first)


def test_write_synthetic_objects_have_documented_sizes(drawn: tuple[dict, Path]) -> None:
    tree, _ = drawn
    objects = [a for a in tree["annotations"] if not a["iscrowd"]]
    sides = np.array([a["bbox"][2:] for a in objects])
    assert sides.min() > 9.98  # corners are rounded to 0.01 px
    assert sides.max() < 70.02
    assert np.mean([a["area"] < 32**2 for a in objects]) > 0.5
    counts = [sum(a["image_id"] == image["id"] for a in objects) for image in tree["images"]]
    assert set(counts) <= set(range(9))
    assert max(counts) == 8
    assert {a["category_id"] for a in objects} == set(CATEGORIES)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' decode under numpy 2
def test_write_synthetic_boxes_areas_and_masks_agree(drawn: tuple[dict, Path]) -> None:
    tree, folder = drawn
    coco = COCO(folder.parent / "annotations.json")
    for annotation in tree["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        assert 0 <= x < x + w <= image["width"] + 0.01
        assert 0 <= y < y + h <= image["height"] + 0.01
        mask = coco.annToMask(annotation)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        found = np.array([columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]])
        tolerance = 0 if annotation["iscrowd"] else 1.5  # pycocotools rasterises polygons to whole pixels
        assert np.abs(found - annotation["bbox"]).max() <= tolerance
        assert abs(mask.sum() - annotation["area"]) <= (0 if annotation["iscrowd"] else 2 * (w + h))


def test_write_synthetic_object_contrasts_with_background(drawn: tuple[dict, Path]) -> None:
    tree, folder = drawn
    coco_sizes = {image["id"]: image for image in tree["images"]}
    for annotation in [a for a in tree["annotations"] if not a["iscrowd"] and a["category_id"] in (1, 3)]:
        x, y, w, h = annotation["bbox"]
        with Image.open(folder / coco_sizes[annotation["image_id"]]["file_name"]) as opened:
            pixels = np.asarray(opened.convert("L"), float)
        cx, cy, reach = round(x + w / 2), round(y + h / 2), round(min(w, h) / 5)
        inside = pixels[cy - reach : cy + reach + 1, cx - reach : cx + reach + 1].mean()
        frame = pixels[max(round(y) - 3, 0) : round(y + h) + 3, max(round(x) - 3, 0) : round(x + w) + 3]
        assert abs(inside - frame[[0, -1]].mean()) > 5 or abs(inside - frame[:, [0, -1]].mean()) > 5


@pytest.mark.parametrize(("images", "size"), [(0, 160), (-1, 160), (3, 20)])
def test_write_synthetic_bad_arguments_are_refused(tmp_path: Path, images: int, size: int) -> None:
    with pytest.raises(InputError, match=r"images.* size"):
        write_synthetic(tmp_path / "out", images=images, seed=0, size=size)
    assert not (tmp_path / "out").exists()
