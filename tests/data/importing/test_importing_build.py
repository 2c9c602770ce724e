"""Every layout, as folder and as archive: the same shards; across layouts the same images, classes and boxes."""

from pathlib import Path

import numpy as np
import pytest
from support.data import contents, stopped_at_the_index
from support.layouts import CLASSES, LAYOUTS, WITH_SPLITS, draw_truth, expected, pack_tree, stored

from pipeline.data.importing.build import build_dataset
from pipeline.data.importing.dataset import Options
from pipeline.data.sharding.diff import diff_shards
from pipeline.data.sharding.verify import verify_shards
from pipeline.errors import AnnotationError, ConfigError

HALF_PIXEL = 0.5


def write(layout: str, root: Path, seed: int = 0) -> Path:
    folder = root / "export"
    LAYOUTS[layout](draw_truth(seed=seed), folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_build_dataset_archive_and_folder_give_the_same_bytes(tmp_path: Path, layout: str) -> None:
    folder = write(layout, tmp_path)
    sources = [folder, pack_tree(folder, tmp_path / "x.zip"), pack_tree(folder, tmp_path / "y.tar", "wrapped/in/")]
    built = []
    for number, source in enumerate(sources):
        out = tmp_path / f"out{number}"
        indexes = build_dataset(str(source), out, Options())
        assert list(indexes) == ["train", "val", "test"]
        assert all(not verify_shards(str(out / split)) for split in indexes)
        built.append(contents(out))
    assert built[0] == built[1] == built[2]


@pytest.mark.parametrize("layout", WITH_SPLITS)
def test_build_dataset_layouts_agree_to_half_a_pixel(tmp_path: Path, layout: str) -> None:
    indexes = build_dataset(str(write(layout, tmp_path)), tmp_path / "out", Options(drop_unused=True))
    for split, scenes in draw_truth().items():
        assert tuple(category.name for category in indexes[split].categories) == CLASSES
        wanted, found = expected(scenes), stored(tmp_path / "out" / split)
        assert found.keys() == wanted.keys()
        for data, boxes in wanted.items():
            assert [name for name, _ in found[data]] == [name for name, _ in boxes]
            corners = [np.array([box for _, box in one]).reshape(-1, 4) for one in (found[data], boxes)]
            for one in corners:
                one[:, 2:] += one[:, :2]
            assert np.abs(corners[0] - corners[1]).max(initial=0) <= HALF_PIXEL


def test_build_dataset_without_splits_holds_every_image_once(tmp_path: Path) -> None:
    indexes = build_dataset(str(write("label_studio_coco", tmp_path)), tmp_path / "out", Options(split=0.2))
    truth = draw_truth()
    wanted = expected([scene for scenes in truth.values() for scene in scenes])
    found = [stored(tmp_path / "out" / split) for split in indexes]
    assert [len(part) for part in found] == [6, 2, 2]
    merged: dict[bytes, object] = {}
    for part in found:
        assert not merged.keys() & part.keys()
        merged |= part
    assert merged == wanted


def test_build_dataset_that_was_stopped_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = str(write("ultralytics", tmp_path))
    with pytest.raises(KeyboardInterrupt), stopped_at_the_index():
        build_dataset(source, tmp_path / "out", Options(), samples_per_shard=2)
    assert not list((tmp_path / "out").rglob("index.json"))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert len(written) == 5
    build_dataset(source, tmp_path / "out", Options(), samples_per_shard=2)
    build_dataset(source, tmp_path / "whole", Options(), samples_per_shard=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in written} == written, "finished tars are kept"


def test_build_dataset_writes_to_a_url(tmp_path: Path) -> None:
    source = str(write("labelme", tmp_path))
    build_dataset(source, tmp_path / "out", Options())
    for split, index in build_dataset(source, "memory://importing/out", Options()).items():
        assert index.folder == f"memory://importing/out/{split}"
        assert diff_shards(index.folder, str(tmp_path / "out" / split)) == []


def test_build_dataset_beside_its_own_shards_is_the_same(tmp_path: Path) -> None:
    source = write("roboflow_coco", tmp_path)
    first = build_dataset(str(source), source / "shards", Options())
    again = build_dataset(str(source), source / "shards", Options())
    assert {split: index.digest for split, index in first.items()} == {s: index.digest for s, index in again.items()}


def test_build_dataset_of_shards_says_what_takes_them(tmp_path: Path) -> None:
    build_dataset(str(write("roboflow_coco", tmp_path)), tmp_path / "out", Options())
    with pytest.raises(AnnotationError, match="these are shards, which `python"):
        build_dataset(str(tmp_path / "out"), tmp_path / "again", Options())


def test_build_dataset_into_its_own_folder_writes_nothing(tmp_path: Path) -> None:
    wrapped = write("label_studio_coco", tmp_path / "wrapper")
    (tmp_path / "link").symlink_to(wrapped)
    before = contents(tmp_path)
    for data, out in (
        (wrapped, wrapped),
        (wrapped, tmp_path / "link"),
        (tmp_path / "link", wrapped),
        (wrapped, wrapped / "images"),
        (wrapped.parent, wrapped),
    ):
        with pytest.raises(ConfigError, match=r"such as .*-shards"):
            build_dataset(str(data), out, Options())
    assert contents(tmp_path) == before
