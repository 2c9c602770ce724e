"""Samples by position: pictures, targets, raw annotations, and damage that is noticed while reading."""

import gc
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers_data import RLE, write_shards
from PIL import Image

from pipeline.data.dataset import DetectionDataset
from pipeline.errors import ShardError


def test_samples_are_the_pictures_and_targets(tmp_path: Path) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder)
    assert len(data) == 12
    for i in range(len(data)):
        image_id = 3 + 7 * i
        path = next((tmp_path / "pictures").glob(f"some_{image_id}.*"))
        assert data.read_image(i) == path.read_bytes(), "bytes as they came"
        sample = data.sample(i)
        assert sample.image_id == image_id
        np.testing.assert_array_equal(np.asarray(sample.image), np.asarray(Image.open(path).convert("RGB")))
        width = sample.image.width
        boxes = [] if i == 3 else [[4, 6, 16.5, 16], [width - 9, 0, width, 12]]
        np.testing.assert_array_equal(sample.boxes_xyxy, np.array(boxes, np.float32).reshape(-1, 4))
        assert sample.labels.tolist() == ([] if i == 3 else [1, 2])
        assert sample.labels.dtype == np.int64


def test_raw_labels_and_raw_annotations(tmp_path: Path) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder, labels="raw")
    assert data.sample(0).labels.tolist() == [13, 90]
    record = data.read_annotations(0)
    assert (record["image_id"], record["height"], record["width"]) == (3, 48, 64)
    assert [a["bbox"] for a in record["annotations"]] == [
        [4, 6, 12.5, 10],
        [55, -3, 20, 15],
        [5, 5, 0, 7],
        [1, 2, 20, 20],
    ]
    assert [a["iscrowd"] for a in record["annotations"]] == [0, 0, 0, 1]
    assert [a.get("segmentation") for a in record["annotations"]] == [None, None, None, RLE]


def test_pickles_and_reads_over_a_url(tmp_path: Path) -> None:
    import fsspec

    local = DetectionDataset(write_shards(tmp_path).folder)
    local.sample(0)
    fsspec.filesystem("memory").put(f"{local.index.folder}/", "/dataset-test/", recursive=True)
    for data in (pickle.loads(pickle.dumps(local)), DetectionDataset("memory://dataset-test")):
        for i in range(len(local)):
            np.testing.assert_array_equal(np.asarray(data.sample(i).image), np.asarray(local.sample(i).image))
            assert data.read_annotations(i) == local.read_annotations(i)


def shard(data: DetectionDataset, number: int) -> Path:
    return Path(data.index.folder) / data.index.shards[number].name


def test_a_truncated_tar_on_a_block_boundary(tmp_path: Path) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder)
    path = shard(data, 1)
    os.truncate(path, path.stat().st_size // 1024 * 512)
    data.sample(0)
    with pytest.raises(
        ShardError, match=rf"{path.name} has [\d,]+ bytes, its index says .* truncated .*jobs\.shard verify"
    ):
        data.sample(6)


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder)
    shard(data, 0).unlink()
    with pytest.raises(ShardError, match=r"cannot read .*000000\.tar: No such file"):
        data.sample(0)


def test_a_shard_of_another_build_with_the_same_size(tmp_path: Path) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder)
    path = shard(data, 0)
    path.write_bytes(path.read_bytes().replace(b"000000000003.jpg", b"000000000004.jpg"))
    with pytest.raises(ShardError, match=r"sample 000000000003 is not where the index says \(no 000000000003\.jpg"):
        data.sample(0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"image_id":3,', b'"image_id":4,', "annotation record of another image"),
        (b'"width":64', b'"width":65', "annotation record of another image"),
        (b'{"annotations"', b'["annotations"', "no annotation record"),
        (b'"bbox":[4,6,', b'"bbox":"4,6,', "no annotation record"),
        (b'"bbox":[', b'"bbix":[', "malformed annotation"),
        (b'"category_id":13', b'"category_id":12', "malformed annotation"),
    ],
)
def test_a_damaged_record_names_shard_and_sample(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder)
    path = shard(data, 0)
    content = path.read_bytes()
    at = content.index(old, int(data.index.samples.json_offset[0]))
    path.write_bytes(content[:at] + new + content[at + len(old) :])
    with pytest.raises(ShardError, match=rf"{path.name}: sample 000000000003 .*{message}"):
        data.sample(0)


def test_a_damaged_picture_names_shard_and_sample(tmp_path: Path) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder)
    path = shard(data, 0)
    content = bytearray(path.read_bytes())
    content[int(data.index.samples.offset[0])] = 0
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"sample 000000000003 is neither JPEG nor PNG"):
        data.sample(0)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_members_stream_through_plain_webdataset(tmp_path: Path) -> None:
    import webdataset

    data = DetectionDataset(write_shards(tmp_path).folder)
    urls = [str(shard(data, number)) for number in range(3)]
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in streamed] == [f"{3 + 7 * i:012d}" for i in range(12)]
    for i, sample in enumerate(streamed):
        assert json.loads(sample["json"]) == data.read_annotations(i)
        assert sample["png" if i == 2 else "jpg"] == data.read_image(i)
    gc.collect()
