"""`diff` lists the differences of two folders, and reads only parts that may differ."""

import json
from pathlib import Path

import pytest
from support.data import edit, noise_image, write_coco

from pipeline.data.dataset import DetectionDataset
from pipeline.data.sharding.diff import diff_shards
from pipeline.data.sharding.shards import build_shards


def test_diff_shards_lists_all_differences(tmp_path: Path) -> None:
    annotations, folder = write_coco(tmp_path)
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    build_shards(annotations, folder, a)
    build_shards(annotations, folder, b, samples_per_shard=5)
    assert diff_shards(a, a) == []
    assert diff_shards(a, b) == ["the same images, cut into 1 and 3 shards"]
    build_shards(annotations, folder, c, limit=5)
    assert diff_shards(a, c) == [f"7 images only in {a}: 38, 45, 52, 59, 66 ..."]
    tree = json.loads(annotations.read_text())
    tree["annotations"][0]["bbox"][0] += 1
    del tree["annotations"][1]
    tree["annotations"].append(tree["annotations"][4] | {"id": 99})
    edit(annotations, {"annotations": tree["annotations"], "categories": [*tree["categories"], {"id": 2, "name": "x"}]})
    noise_image((48, 64), 99).save(folder / "some_3.jpg")
    build_shards(annotations, folder, d)
    assert diff_shards(a, d) == [
        f"1 categories only in {d}: x (2)",
        "1 images have different files: 3",
        "2 images have different annotations (1 annotations removed, 1 added, 1 changed): 3, 10",
    ]


def test_diff_shards_equal_tars_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations, folder = write_coco(tmp_path)
    build_shards(annotations, folder, tmp_path / "a", samples_per_shard=5)
    noise_image((48, 64), 99).save(folder / "some_3.jpg")
    build_shards(annotations, folder, tmp_path / "b", samples_per_shard=5)
    read = []

    def note(data: DetectionDataset, i: int, whole: object = DetectionDataset.read_image) -> bytes:
        read.append(i)
        return whole(data, i)  # type: ignore[operator]

    monkeypatch.setattr(DetectionDataset, "read_image", note)
    assert diff_shards(str(tmp_path / "a"), str(tmp_path / "b")) == ["1 images have different files: 3"]
    assert sorted(set(read)) == [0, 1, 2, 3, 4], "those of the first shard"
