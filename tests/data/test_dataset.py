"""Samples by position: images, targets and raw annotations."""

import gc
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data import RLE, write_shards

from pipeline.data.dataset import DetectionDataset


def test_sample_equals_image_and_targets(tmp_path: Path) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder)
    assert len(data) == 12
    for i in range(len(data)):
        image_id = 3 + 7 * i
        path = next((tmp_path / "images").glob(f"some_{image_id}.*"))
        assert data.read_image(i) == path.read_bytes(), "bytes as they came"
        sample = data.sample(i)
        assert sample.image_id == image_id
        np.testing.assert_array_equal(np.asarray(sample.image), np.asarray(Image.open(path).convert("RGB")))
        width = sample.image.width
        boxes = [] if i == 3 else [[4, 6, 16.5, 16], [width - 9, 0, width, 12]]
        np.testing.assert_array_equal(sample.boxes_xyxy, np.array(boxes, np.float32).reshape(-1, 4))
        assert sample.labels.tolist() == ([] if i == 3 else [1, 2])
        assert sample.labels.dtype == np.int64


def test_dataset_raw_labels_and_annotations(tmp_path: Path) -> None:
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


def test_dataset_pickles_and_reads_url(tmp_path: Path) -> None:
    import fsspec

    local = DetectionDataset(write_shards(tmp_path).folder)
    local.sample(0)
    fsspec.filesystem("memory").put(f"{local.index.folder}/", "/dataset-test/", recursive=True)
    for data in (pickle.loads(pickle.dumps(local)), DetectionDataset("memory://dataset-test")):
        for i in range(len(local)):
            np.testing.assert_array_equal(np.asarray(data.sample(i).image), np.asarray(local.sample(i).image))
            assert data.read_annotations(i) == local.read_annotations(i)


def test_sample_reads_members_in_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder)
    reads: list[int] = []
    read = data.reader.read
    monkeypatch.setattr(data.reader, "read", lambda *args: reads.append(args[2]) or read(*args))
    data.sample(2)
    assert len(reads) == 1
    assert data.size(2) == (data.sample(2).image.height, data.sample(2).image.width)


def test_sample_at_least_keeps_targets(tmp_path: Path) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder)
    whole, small = data.sample(0), data.sample(0, at_least=(20, 30))
    assert (small.shrink, small.image.size, small.size) == (2, (32, 24), (48, 64))
    np.testing.assert_array_equal(whole.boxes_xyxy, small.boxes_xyxy)
    assert data.sample(2, at_least=(1, 1)).shrink == 1, "a PNG has no smaller form"


def test_shared_equals_dataset(tmp_path: Path) -> None:
    data = DetectionDataset(write_shards(tmp_path).folder)
    shared = data.shared()
    assert shared.identity == data.identity
    for i in range(len(data)):
        assert shared.read_annotations(i) == data.read_annotations(i)
        np.testing.assert_array_equal(shared.sample(i).boxes_xyxy, data.sample(i).boxes_xyxy)


def shard(data: DetectionDataset, number: int) -> Path:
    return Path(data.index.folder) / data.index.shards[number].name


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_members_are_read_by_webdataset(tmp_path: Path) -> None:
    import webdataset

    data = DetectionDataset(write_shards(tmp_path).folder)
    urls = [str(shard(data, number)) for number in range(3)]
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in streamed] == [f"{3 + 7 * i:012d}" for i in range(12)]
    for i, sample in enumerate(streamed):
        assert json.loads(sample["json"]) == data.read_annotations(i)
        assert sample["png" if i == 2 else "jpg"] == data.read_image(i)
    gc.collect()
