"""One tar is a pure function of its plan, its rows match its members, and it is reused only if nothing has changed."""

import dataclasses
import gc
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.data import noise_image, write_coco

from pipeline.data.index import ROW
from pipeline.data.sharding.lint import examine
from pipeline.data.sharding.output import Output
from pipeline.data.sharding.shard_writer import ShardPlan, receipt_name, write_shard
from pipeline.errors import ShardError


def plan(tmp_path: Path, name: str = "x-000000.tar") -> ShardPlan:
    if not (tmp_path / "instances.json").exists():
        write_coco(tmp_path)
    samples = examine(tmp_path / "instances.json", str(tmp_path / "images")).samples
    out = Output(str(tmp_path / "out"))
    out.prepare()
    out.release()
    return ShardPlan(0, name, str(tmp_path / "out"), samples, "digest of the plan")


def test_write_shard_rows_match_members(tmp_path: Path) -> None:
    work = plan(tmp_path)
    receipt = write_shard(work)
    data = (tmp_path / "out" / work.name).read_bytes()
    assert (receipt.info.name, receipt.info.bytes, receipt.info.samples) == (work.name, len(data), 12)
    for (image, where), row in zip(work.samples, receipt.rows, strict=True):
        fields = dict(zip(ROW.names or (), row, strict=True))
        assert (fields["image_id"], fields["width"], fields["height"]) == (image.id, image.width, image.height)
        offset, length = fields["offset"], fields["length"]
        assert data[offset : offset + length] == Path(where.path).read_bytes(), "bytes as they came"
        offset, length = fields["json_offset"], fields["json_length"]
        assert data[offset : offset + length] == image.record
    assert receipt.summary.images == 12


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_write_shard_tar_is_read_by_webdataset(tmp_path: Path) -> None:
    import webdataset

    work = plan(tmp_path)
    write_shard(work)
    streamed = list(webdataset.WebDataset(str(tmp_path / "out" / work.name), shardshuffle=False))
    assert len(streamed) == len(work.samples)
    for (image, where), sample in zip(work.samples, streamed, strict=True):
        kind = "png" if where.path.endswith("png") else "jpg"
        assert (sample["__key__"], sample["json"]) == (f"{image.id:012d}", image.record)
        assert sample[kind] == Path(where.path).read_bytes()
        assert {name for name in sample if not name.startswith("_")} == {kind, "json"}
    gc.collect()


def test_write_shard_same_plan_gives_same_bytes(tmp_path: Path) -> None:
    first, second = (write_shard(plan(tmp_path, name)) for name in ("a.tar", "b.tar"))
    assert (first.info.sha256, first.rows) == (second.info.sha256, second.rows)


def truncate(tar: Path, note: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:-512])


def flip(tar: Path, note: Path) -> None:
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)


def change(name: str, value: object) -> Callable[[Path, Path], None]:
    return lambda tar, note: note.write_text(json.dumps(json.loads(note.read_text()) | {name: value}))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        lambda tar, note: tar.unlink(),
        lambda tar, note: note.unlink(),
        lambda tar, note: note.write_text("{"),
        lambda tar, note: note.write_text("[]"),
        change("plan", "another"),
        change("info", {"name": "x"}),
        change("summary", {"images": 3}),
    ],
)
def test_write_shard_finished_tar_is_kept_if_unchanged(tmp_path: Path, damage: Callable[[Path, Path], None]) -> None:
    work = plan(tmp_path)
    receipt = write_shard(work)
    tar, note = tmp_path / "out" / work.name, tmp_path / "out" / receipt_name(work.name)
    good = tar.read_bytes()
    os.utime(tar, ns=(1, 1))
    assert write_shard(work) == receipt
    assert tar.stat().st_mtime_ns == 1, "kept"
    damage(tar, note)
    assert write_shard(work) == receipt
    assert tar.read_bytes() == good
    assert tar.stat().st_mtime_ns > 1, "written again"


def test_write_shard_names_all_faulty_images(tmp_path: Path) -> None:
    work = plan(tmp_path)
    cut = (tmp_path / "images" / "some_3.jpg").read_bytes()[:-150]
    (tmp_path / "images" / "some_3.jpg").write_bytes(cut)
    (tmp_path / "images" / "some_10.jpg").unlink()
    noise_image((10, 10), 1).save(tmp_path / "images" / "some_80.jpg")
    with pytest.raises(ShardError, match=r"^x-000000\.tar ") as caught:
        write_shard(work)
    assert re.findall(r"some_\d+\.jpg (?:has|cannot|is)", str(caught.value)) == [
        *("some_3.jpg has", "some_10.jpg cannot", "some_80.jpg has"),
    ]
    assert not (tmp_path / "out" / work.name).exists()


def test_write_shard_missing_folder_is_explained(tmp_path: Path) -> None:
    work = dataclasses.replace(plan(tmp_path), out=str(tmp_path / "nowhere"))
    with pytest.raises(ShardError, match=r"x-000000\.tar"):
        write_shard(work)
    assert not (tmp_path / "nowhere").exists()
