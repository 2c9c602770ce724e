"""Building: the same bytes however it is run, kept work after a kill, and nothing left behind by bad input."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers_data import contents, edit, picture, write_coco

from pipeline.data import shards
from pipeline.data.index import load_index
from pipeline.data.shards import build_shards
from pipeline.errors import AnnotationError, PipelineError, ResourceError, ShardError


def test_members_are_anonymous_and_in_order(tmp_path: Path) -> None:
    index = build_shards(*write_coco(tmp_path), tmp_path / "out", samples_per_shard=5)
    names = []
    for shard in index.shards:
        assert shard.name.startswith("pictures-" + index.source_digest[:8])
        with tarfile.open(tmp_path / "out" / shard.name, "r:") as tar:
            members = tar.getmembers()
        names += [member.name for member in members]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in members} == {(0, 0, 0, 0o644, "", "")}
    keys = [f"{3 + 7 * i:012d}" for i in range(12)]
    kinds = [("json", "png") if i == 2 else ("jpg", "json") for i in range(12)]
    assert names == [f"{key}.{kind}" for key, pair in zip(keys, kinds, strict=True) for kind in pair]
    assert sorted(contents(tmp_path / "out")) == sorted(["index.json", "samples.npy", *(s.name for s in index.shards)])


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's own
def test_two_processes_write_the_same_bytes_and_carry_errors(tmp_path: Path) -> None:
    import ray

    source = write_coco(tmp_path)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for workers in (1, 2):
            build_shards(*source, tmp_path / str(workers), samples_per_shard=3, workers=workers)
        assert contents(tmp_path / "1") == contents(tmp_path / "2")
        with pytest.raises(ResourceError, match=r"--workers 3 .* the Ray cluster has: 2"):
            build_shards(*source, tmp_path / "3", workers=3)
        path = tmp_path / "pictures" / "some_3.jpg"
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ShardError, match=r"^\S*some_3\.jpg does not decode"):
            build_shards(*source, tmp_path / "4", workers=2)
    finally:
        ray.shutdown()
    assert not (tmp_path / "3").exists()
    assert not (tmp_path / "4").exists()


def test_more_workers_than_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ResourceError, match="--workers 999 asks for more CPUs than this machine has"):
        build_shards(*write_coco(tmp_path), tmp_path / "out", workers=999)
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pipeline.data import shards
checked = []
def check(data, size, check=shards.check_decodes):
    checked.append(size)
    if len(checked) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    check(data, size)
shards.check_decodes = check
shards.build_shards(*sys.argv[1:4], samples_per_shard=5)
"""


def test_a_killed_build_keeps_finished_shards_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    annotations, folder = write_coco(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "out"
    build_shards(annotations, folder, whole, samples_per_shard=5)
    killed = subprocess.run([sys.executable, "-c", KILLED, annotations, folder, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ShardError, match="its build was stopped"):
        load_index(str(out))
    (finished,) = out.glob("*.tar")
    assert len(list((out / ".build").iterdir())) == 2, "the receipt of the finished tar, and the half-written one"
    before = finished.stat()
    build_shards(annotations, folder, out, samples_per_shard=5)
    assert (finished.stat().st_ino, finished.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "kept"
    assert contents(out) == contents(whole), "and nothing of the half-written one is left"


@pytest.mark.parametrize("change", ["picture", "tar", "receipt", "annotations"])
def test_a_finished_shard_is_written_again_if_anything_changed(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations, folder = write_coco(tmp_path)
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "encode_index", stop)
        with pytest.raises(KeyboardInterrupt):
            build_shards(annotations, folder, out, samples_per_shard=5)
    first = min(out.glob("*.tar"))
    if change == "picture":
        picture((48, 64), 99).save(folder / "some_3.jpg")
        os.utime(folder / "some_3.jpg", ns=(1, 1))
    elif change == "tar":
        first.write_bytes(first.read_bytes()[:-512])
    elif change == "receipt":
        (out / ".build" / f"{first.name}.json").write_text("{}")
    else:
        edit(annotations, {"annotations": []})
    index = build_shards(annotations, folder, out, samples_per_shard=5)
    fresh = build_shards(annotations, folder, tmp_path / "fresh", samples_per_shard=5)
    assert index.digest == fresh.digest
    assert contents(out).items() >= contents(tmp_path / "fresh").items()


def test_a_stopped_build_with_another_plan_leaves_no_shards_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_coco(tmp_path), tmp_path / "out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "encode_index", stop)
        with pytest.raises(KeyboardInterrupt):
            build_shards(*source, out, samples_per_shard=2)
    assert len(list(out.glob("*.tar"))) == 6
    build_shards(*source, out, samples_per_shard=5)
    build_shards(*source, tmp_path / "fresh", samples_per_shard=5)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_finished_folder_is_left_alone_or_refused(tmp_path: Path) -> None:
    annotations, folder = write_coco(tmp_path)
    out = tmp_path / "out"
    index = build_shards(annotations, folder, out, samples_per_shard=5)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build_shards(annotations, folder, out, samples_per_shard=5).digest == index.digest
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    for change in ({"samples_per_shard": 4}, {"samples_per_shard": 5, "limit": 3}):
        with pytest.raises(ShardError, match="already holds another data set"):
            build_shards(annotations, folder, out, **change)
    picture((48, 64), 99).save(folder / "some_3.jpg", quality=30)
    with pytest.raises(ShardError, match="already holds another data set"):
        build_shards(annotations, folder, out, samples_per_shard=5)


def test_limit(tmp_path: Path) -> None:
    index = build_shards(*write_coco(tmp_path), tmp_path / "out", limit=4)
    assert index.samples.image_id.tolist() == [3, 10, 17, 24]


def refused(tmp_path: Path, match: str, kind: type[PipelineError] = ShardError) -> None:
    """The build fails like this and leaves nothing behind."""
    with pytest.raises(kind, match=match):
        build_shards(tmp_path / "instances.json", tmp_path / "pictures", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_pictures_are_counted(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for path in (tmp_path / "pictures").glob("*.jpg"):
        path.unlink()
    refused(
        tmp_path,
        r"names pictures that are not in .*: 11 missing files: some_3\.jpg; some_10\.jpg; .*; and 6 more",
        AnnotationError,
    )
    (tmp_path / "pictures" / "some_17.png").unlink()
    (tmp_path / "pictures").rmdir()
    refused(tmp_path, "there is no image folder", AnnotationError)


def test_zero_images(tmp_path: Path) -> None:
    write_coco(tmp_path)
    edit(tmp_path / "instances.json", {"images": [], "annotations": []})
    refused(tmp_path, "lists no images", AnnotationError)


def test_pictures_that_disagree_with_their_annotation_come_in_one_message(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)[1]
    picture((10, 20), 1).save(folder / "some_3.jpg")
    (folder / "some_10.jpg").write_text("no picture")
    refused(tmp_path, r"2 faulty pictures: some_3\.jpg is 20 x 10 .* says 64 x 48.*; some_10\.jpg is neither")


def test_a_truncated_picture(tmp_path: Path) -> None:
    path = write_coco(tmp_path)[1] / "some_73.jpg"
    path.write_bytes(path.read_bytes()[:-150])
    refused(tmp_path, r"some_73\.jpg does not decode")


def test_a_picture_that_vanishes_or_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_coco(tmp_path)[1]
    monkeypatch.setattr(shards, "_check_pictures", lambda *_: (folder / "some_80.jpg").unlink())
    refused(tmp_path, r"cannot write .*some_80\.jpg.* run the same command again")


def test_a_picture_over_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path)
    monkeypatch.setattr(shards, "MAX_BYTES", 100)
    refused(tmp_path, r"has files over .*, 12 files: some_3")


def test_long_metadata_before_the_header(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, images=1)[1]
    picture((48, 64), 1).save(folder / "some_3.jpg", icc_profile=bytes(100_000))
    assert len(build_shards(tmp_path / "instances.json", folder, tmp_path / "out")) == 1


def test_the_output_folder_is_never_mixed_with_other_files(tmp_path: Path) -> None:
    source = write_coco(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    with pytest.raises(ShardError, match="is not empty"):
        build_shards(*source, out)
    with pytest.raises(ShardError, match="is a URL"):
        build_shards(*source, "memory://out")
    with pytest.raises(ShardError, match="commands are never run"):
        build_shards(*source, "pipe:cat > x")
    with pytest.raises(ShardError, match="cannot write"):
        build_shards(*source, out / "precious.txt" / "below")
    with pytest.raises(ShardError, match="at least 1"):
        build_shards(*source, tmp_path / "new", samples_per_shard=0)
    assert contents(out) == {"precious.txt": b"x"}


def test_records_hold_what_the_annotations_said(tmp_path: Path) -> None:
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
