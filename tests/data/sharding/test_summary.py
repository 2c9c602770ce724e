"""Counts agree with training and pycocotools, are summed over shards, and are counted again without a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.cocoeval import Params
from support.data import RLE, write_shards

from pipeline.data.sharding.summary import SUMMARY, ClassCounts, Summary, decode_summary, encode_summary, load_summary


def annotation(category: int, bbox: list[float], area: float, crowd: int = 0) -> dict[str, Any]:
    return {"id": 1, "category_id": category, "bbox": bbox, "area": area, "iscrowd": crowd, "segmentation": RLE}


IMAGES = [
    [
        annotation(1, [0, 0, 40, 40], 1023.9),
        annotation(1, [0, 0, 40, 40], 1024),
        annotation(7, [0, 0, 9, 9], 9215.9),
        annotation(7, [0, 0, 9, 9], 9216),
        annotation(7, [0, 0, 0, 9], 5000),
        annotation(1, [0, 0, 9, 9], 50, crowd=1),
    ],
    [],
    [annotation(9, [5, 5, 9, 9], 50, crowd=1)],
    [annotation(1, [5, 5, 9, 9], 1)],
]


def test_summary_add_counts_boxes() -> None:
    summary = Summary()
    assert [summary.add(image, (50, 50)) for image in IMAGES] == [(4, 1), (0, 0), (0, 1), (1, 0)]
    classes = {1: ClassCounts(2, 3, 1), 7: ClassCounts(1, 2, 0), 9: ClassCounts(0, 0, 1)}
    assert summary == Summary(4, 2, 2, 2, 1, 2, 1, classes)
    assert summary.boxes == 5


def test_summary_sizes_equal_pycocotools() -> None:
    """Between the limits; on one of them pycocotools counts an object twice."""
    params = Params(iouType="bbox")
    ranges = dict(zip(params.areaRngLbl, params.areaRng, strict=True))
    for area in (0.5, 1023, 1025, 9215, 9217, 10**6):
        summary = Summary()
        summary.add([annotation(1, [0, 0, 9, 9], area)], (50, 50))
        for name in ("small", "medium", "large"):
            assert getattr(summary, name) == (ranges[name][0] < area < ranges[name][1])


@given(st.lists(st.sampled_from(IMAGES), max_size=6), st.integers(0, 6))
def test_summary_merge_and_json_keep_counts(images: list[list[dict[str, Any]]], cut: int) -> None:
    whole, parts = Summary(), (Summary(), Summary())
    for number, image in enumerate(images):
        whole.add(image, (50, 50))
        parts[number < cut].add(image, (50, 50))
    total = Summary()
    for part in parts:
        total.merge(Summary.from_json(json.loads(json.dumps(part.to_json()))))
    assert total == whole


def test_decode_summary_other_file_gives_none() -> None:
    summary = Summary(images=3, classes={4: ClassCounts(1, 2, 3)})
    data = encode_summary(summary, "digest")
    assert decode_summary(data, "digest") == summary
    assert decode_summary(data, "another") is None
    document = json.loads(data)
    for change in ({"version": 2}, {"format": "x"}, {"classes": 3}, {"more": 1}, {"classes": {"x": {}}}):
        assert decode_summary(json.dumps(document | change).encode(), "digest") is None
    for text in (b"", b"[]", b"null", b"\xff", b"[" * 100_000):
        assert decode_summary(text, "digest") is None


def test_load_summary_reads_file_or_counts_records(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / SUMMARY
    stored = load_summary(index)
    assert (stored.images, stored.boxes, stored.crowds) == (12, int(np.sum(index.samples.boxes)), 11)
    assert (stored.empty, stored.dropped) == (1, 11)
    path.write_bytes(encode_summary(Summary(images=99), index.digest))
    assert load_summary(index).images == 99
    path.write_bytes(encode_summary(Summary(images=99), "another"))
    assert load_summary(index) == stored
    path.unlink()
    assert load_summary(index) == stored


def test_table_names_every_category(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    lines = load_summary(index).table(index)
    assert [line.split()[0] for line in lines[:8]] == [
        *("shards", "images", "boxes", "crowd", "dropped", "digest", "categories"),
        "id",
    ]
    assert "12, of which 1 without a box" in lines[1]
    assert "22 to train on; by COCO's areas 22 small, 0 medium, 0 large" in lines[2]
    assert index.digest in lines[5]
    assert [line.split() for line in lines[8:]] == [
        ["1", "person", "0", "0", "11"],
        ["13", "sign", "11", "11", "0"],
        ["90", "kite", "11", "11", "0"],
    ]
