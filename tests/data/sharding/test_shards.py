"""Builds: always the same bytes, finished work is kept after a kill, and bad input leaves nothing."""

import dataclasses
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.data import contents, edit, noise_image, pack, write_coco

from pipeline.data.sharding import shard_writer, shards, sources
from pipeline.data.sharding.annotations import CocoImage
from pipeline.data.sharding.image_files import ImageFile
from pipeline.data.sharding.rules import Rule
from pipeline.data.sharding.shard_writer import Receipt, ShardPlan, write_shard
from pipeline.data.sharding.shards import Sample, _cut, build_shards
from pipeline.errors import AnnotationError, PipelineError, ResourceError, ShardError


def test_build_members_are_anonymous_and_sorted(tmp_path: Path) -> None:
    index = build_shards(*write_coco(tmp_path), tmp_path / "out", samples_per_shard=5)
    names = []
    for shard in index.shards:
        assert shard.name.startswith("images-" + index.source_digest[:8])
        with tarfile.open(tmp_path / "out" / shard.name, "r:") as tar:
            members = tar.getmembers()
        names += [member.name for member in members]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in members} == {(0, 0, 0, 0o644, "", "")}
    keys = [f"{3 + 7 * i:012d}" for i in range(12)]
    kinds = [("json", "png") if i == 2 else ("jpg", "json") for i in range(12)]
    assert names == [f"{key}.{kind}" for key, pair in zip(keys, kinds, strict=True) for kind in pair]
    files = ["index.json", "samples.npy", "summary.json", *(s.name for s in index.shards)]
    assert sorted(contents(tmp_path / "out")) == sorted(files)


def test_build_more_workers_than_cpus_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ResourceError, match="--workers 999"):
        build_shards(*write_coco(tmp_path), tmp_path / "out", workers=999)
    assert not (tmp_path / "out").exists()


def test_build_finished_folder_is_reused_or_refused(tmp_path: Path) -> None:
    annotations, folder = write_coco(tmp_path)
    out = tmp_path / "out"
    index = build_shards(annotations, folder, out, samples_per_shard=5)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build_shards(annotations, folder, out, samples_per_shard=5).digest == index.digest
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    for change in ({"samples_per_shard": 4}, {"samples_per_shard": 5, "limit": 3}):
        with pytest.raises(ShardError, match=str(out)):
            build_shards(annotations, folder, out, **change)
    noise_image((48, 64), 99).save(folder / "some_3.jpg", quality=30)
    with pytest.raises(ShardError, match=str(out)):
        build_shards(annotations, folder, out, samples_per_shard=5)


def test_build_limit_takes_first_images(tmp_path: Path) -> None:
    index = build_shards(*write_coco(tmp_path), tmp_path / "out", limit=4)
    assert index.samples.image_id.tolist() == [3, 10, 17, 24]


def refused(tmp_path: Path, match: str, kind: type[PipelineError] = AnnotationError) -> None:
    """The build fails like this and leaves nothing behind."""
    with pytest.raises(kind, match=match):
        build_shards(tmp_path / "instances.json", tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_build_missing_images_are_counted(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for path in (tmp_path / "images").glob("*.jpg"):
        path.unlink()
    refused(tmp_path, rf"{Rule.MISSING_FILE.what} \(11\): some_3\.jpg, some_10\.jpg, .*, \.\.\.;")
    (tmp_path / "images" / "some_17.png").unlink()
    (tmp_path / "images").rmdir()
    refused(tmp_path, str(tmp_path / "images"))


def test_build_without_images_is_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    edit(tmp_path / "instances.json", {"images": [], "annotations": []})
    refused(tmp_path, rf"{Rule.EMPTY_LIST.what} .*images")


def test_build_all_faults_come_in_one_message(tmp_path: Path) -> None:
    annotations, folder = write_coco(tmp_path)
    noise_image((10, 20), 1).save(folder / "some_3.jpg")
    (folder / "some_10.jpg").write_text("no image")
    tree = json.loads(annotations.read_text())
    tree["annotations"][0]["category_id"] = 5
    annotations.write_text(json.dumps(tree))
    refused(
        tmp_path,
        rf"{Rule.UNKNOWN_CATEGORY.what} \(1\): annotation 1 of image 3 \(category_id 5\);[\s\S]*"
        rf"{Rule.UNREADABLE_FILE.what} \(1\): some_10\.jpg .*JPEG .*PNG[\s\S]*"
        rf"{Rule.WRONG_SIZE.what} \(1\): some_3\.jpg .*20 x 10.* 64 x 48",
    )


def test_build_truncated_image_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)[1]
    for name in ("some_73.jpg", "some_80.jpg"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-150])
    refused(tmp_path, r"000000\.tar .*some_73\.jpg .*; some_80\.jpg .*jobs\.lint", ShardError)


def test_build_vanished_image_is_named(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "refuse", lambda *_: (folder / "some_80.jpg").unlink())
        refused(tmp_path, r"some_80\.jpg .*No such file", ShardError)


def test_build_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer, "_write_tar", full)
    refused(tmp_path, r"images-\w+-000000\.tar .*No space left", ShardError)


def test_build_too_large_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path)
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    refused(tmp_path, rf"{Rule.UNREADABLE_FILE.what} \(12\): some_3\.jpg .* 100\b")


@pytest.mark.parametrize("archive", ["images.zip", "images.tar"])
def test_build_archives_give_same_bytes_as_folder(tmp_path: Path, archive: str) -> None:
    annotations, folder = write_coco(tmp_path)
    packed = pack(folder, tmp_path / archive, "train2017/")
    build_shards(annotations, folder, tmp_path / "a", samples_per_shard=5)
    build_shards(annotations, packed, tmp_path / "b", samples_per_shard=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_build_url_gives_same_bytes_as_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    source, url = write_coco(tmp_path), "memory://built/deep/train"
    index = build_shards(*source, tmp_path / "a", samples_per_shard=5)
    assert build_shards(*source, url, samples_per_shard=5).digest == index.digest
    store = fsspec.filesystem("memory")
    found = {path.rpartition("/")[2]: store.cat(path) for path in store.find("/built/deep/train")}
    assert found == contents(tmp_path / "a")
    assert build_shards(*source, url, samples_per_shard=5).folder == url, "a finished one is left as it is"
    with pytest.raises(ShardError, match=url):
        build_shards(*source, url, samples_per_shard=4)
    assert list((tmp_path / "temporary").iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 900_000), st.integers(1, 9_000)), min_size=1, max_size=40), st.integers(1, 3))
def test_plan_by_size_fills_tars(sizes: list[tuple[int, int]], mib: int) -> None:
    samples = [
        (CocoImage(i, "x", 1, 1, bytes(record)), ImageFile("x", length, 0)) for i, (length, record) in enumerate(sizes)
    ]

    def tar_bytes(part: Sequence[Sample]) -> int:
        """As `tarfile` writes it: headers, whole blocks, two blocks at the end, whole records."""
        blocks = sum(2 + -(-p.length // 512) + -(-len(i.record) // 512) for i, p in part) + 2
        return -(-blocks // 20) * 10240

    parts = list(_cut(samples, 7, mib))
    assert [sample for part in parts for sample in part] == samples
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        assert tar_bytes(part) <= mib * 2**20 or len(part) == 1
        assert following is None or tar_bytes([*part, following[0]]) > mib * 2**20
    assert [len(part) for part in _cut(samples, 7, None)][:-1] == [7] * ((len(samples) - 1) // 7)


def test_build_by_size_limits_tars(tmp_path: Path) -> None:
    annotations, folder = write_coco(tmp_path, images=5)
    rng = np.random.default_rng(0)
    for path, entry in zip(sorted(folder.iterdir()), json.loads(annotations.read_text())["images"], strict=False):
        assert path.name.startswith("some_")
        noise = rng.integers(0, 256, (700, 700, 3), np.uint8)
        Image.fromarray(noise).save(folder / entry["file_name"], quality=85)
    tree = json.loads(annotations.read_text())
    edit(annotations, {"images": [{**image, "width": 700, "height": 700} for image in tree["images"]]})
    index = build_shards(annotations, folder, tmp_path / "out", mib_per_shard=1)
    assert len(index.shards) > 2
    assert all(shard.bytes <= 2**20 for shard in index.shards if shard.samples > 1)


def test_build_node_with_other_folder_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_coco(tmp_path)

    def elsewhere(plan: ShardPlan) -> Receipt:
        (tmp_path / "node" / ".build").mkdir(parents=True, exist_ok=True)
        return write_shard(dataclasses.replace(plan, out=str(tmp_path / "node")))

    monkeypatch.setattr(shards, "write_shard", elsewhere)
    with pytest.raises(ShardError, match=r"000000\.tar .*OUT"):
        build_shards(*source, tmp_path / "out", samples_per_shard=5)


def test_build_long_metadata_before_header_is_read(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, images=1)[1]
    noise_image((48, 64), 1).save(folder / "some_3.jpg", icc_profile=bytes(100_000))
    assert len(build_shards(tmp_path / "instances.json", folder, tmp_path / "out")) == 1


def test_build_into_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    source = write_coco(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    with pytest.raises(ShardError, match=str(out)):
        build_shards(*source, out)
    for images in ("pipe:cat x", "-"):
        with pytest.raises(ShardError, match=f"'{images}'"):
            build_shards(source[0], images, tmp_path / "new")
    with pytest.raises(ShardError, match="'pipe:cat > x'"):
        build_shards(*source, "pipe:cat > x")
    with pytest.raises(ShardError, match=r"precious\.txt"):
        build_shards(*source, out / "precious.txt" / "below")
    with pytest.raises(ShardError, match="--samples-per-shard"):
        build_shards(*source, tmp_path / "new", samples_per_shard=0)
    assert contents(out) == {"precious.txt": b"x"}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_build_writes_only_into_folder(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with `..`, in an archive or in the annotations, stay names; temporary files are removed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    annotations, folder = write_coco(tmp_path, images=2)
    packed = pack(folder, tmp_path / f"images.{kind}")
    evil = ("../evil.jpg", "/tmp/../evil.jpg", "a/../../evil.jpg", "some_3.jpg/../../evil")
    if kind == "zip":
        with zipfile.ZipFile(packed, "a") as archive:
            for name in evil:
                archive.writestr(name, "evil")
    else:
        with tarfile.open(packed, "a") as tar:
            for name in evil:
                tar.addfile(tarfile.TarInfo(name))
    before = contents(tmp_path)
    for out in ("out", "memory://outside/out"):
        build_shards(annotations, packed, out)
    assert {name for name in contents(tmp_path) if not name.startswith("out/")} == set(before)
    tree = json.loads(annotations.read_text())
    for name in evil:
        edit(annotations, {"images": [tree["images"][0] | {"file_name": name}], "annotations": []})
        with pytest.raises(AnnotationError, match=Rule.BAD_FILE_NAME.what):
            build_shards(annotations, packed, "new")
    assert not (tmp_path / "new").exists()


def test_build_records_equal_annotations(tmp_path: Path) -> None:
    annotations, folder = write_coco(tmp_path)
    index = build_shards(annotations, folder, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / index.shards[0].name, "r:") as tar:
        member = tar.extractfile("000000000010.json")
        assert member is not None
        record = json.loads(member.read())
    source = [a for a in json.loads(annotations.read_text())["annotations"] if a["image_id"] == 10]
    for kept, original in zip(record["annotations"], source, strict=True):
        assert kept == {key: original[key] for key in kept}
        assert ("segmentation" in kept) == bool(original["iscrowd"])
