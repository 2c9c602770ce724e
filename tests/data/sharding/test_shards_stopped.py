"""Builds that are stopped at any moment: finished shards are kept, and the result has the same bytes."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.data import contents, edit, noise_image, stopped_at_the_index, write_coco

from pipeline.data.index import load_index
from pipeline.data.sharding import shard_writer
from pipeline.data.sharding.output import BUILD, Output
from pipeline.data.sharding.shard_writer import ShardPlan
from pipeline.data.sharding.shards import build_shards
from pipeline.errors import ShardError
from pipeline.files import retry

KILLED = """
import os, signal, sys
from pipeline.data.sharding import shard_writer, shards
checked = []
def check(data, size, check=shard_writer.check_decodes):
    checked.append(size)
    if len(checked) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    check(data, size)
shard_writer.check_decodes = check
shards.build_shards(*sys.argv[1:4], samples_per_shard=5)
"""


def written(build: Callable[[], object]) -> list[str]:
    """The tars that a build writes, in order."""
    names = []

    def note(plan: ShardPlan, path: Path, write: Any = shard_writer._write_tar) -> Any:
        names.append(plan.name[-10:-4])
        return write(plan, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "_write_tar", note)
        build()
    return names


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_build_killed_keeps_finished_shards_and_gives_same_bytes(tmp_path: Path, scheme: str) -> None:
    annotations, folder = write_coco(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "out"
    build_shards(annotations, folder, whole, samples_per_shard=5)
    command = [sys.executable, "-c", KILLED, annotations, folder, f"{scheme}{out}"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run(command, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ShardError, match=rf"{out} .*jobs\.shard build"):
        load_index(str(out))
    (finished,) = out.glob("*.tar")
    half = 1 if not scheme else 0  # a remote tar is uploaded when it is complete
    assert len(list((out / ".build").iterdir())) == 1 + half, (
        "the receipt of the finished tar, and the half-written one"
    )
    before = finished.stat()
    again = written(lambda: build_shards(annotations, folder, f"{scheme}{out}", samples_per_shard=5))
    assert again == ["000001", "000002"], "only the missing ones"
    assert (finished.stat().st_ino, finished.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "kept"
    assert contents(out) == contents(whole), "and nothing of the half-written one is left"


@pytest.mark.parametrize("stop_at", ["samples.npy", "summary.json", "index.json", ".build"])
def test_build_stopped_at_its_end_continues(tmp_path: Path, stop_at: str) -> None:
    source, out = write_coco(tmp_path), tmp_path / "out"
    build_shards(*source, tmp_path / "whole", samples_per_shard=5)

    def stop(output: Output, name: str, *data: bytes, action: Any) -> None:
        if name == stop_at:
            raise KeyboardInterrupt
        action(output, name, *data)

    with pytest.MonkeyPatch.context() as patch:
        method = "remove" if stop_at == ".build" else "write"
        patch.setattr(Output, method, functools.partialmethod(stop, action=getattr(Output, method)))
        with pytest.raises(KeyboardInterrupt):
            build_shards(*source, out, samples_per_shard=5)
    assert written(lambda: build_shards(*source, out, samples_per_shard=5)) == []
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["image", "tar", "receipt", "annotations"])
def test_build_changed_input_rewrites_shard(tmp_path: Path, change: str) -> None:
    annotations, folder = write_coco(tmp_path)
    out = tmp_path / "out"
    with stopped_at_the_index(), pytest.raises(KeyboardInterrupt):
        build_shards(annotations, folder, out, samples_per_shard=5)
    first = min(out.glob("*.tar"))
    if change == "image":
        noise_image((48, 64), 99).save(folder / "some_3.jpg")
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


def test_build_with_another_plan_removes_old_shards(tmp_path: Path) -> None:
    source, out = write_coco(tmp_path), tmp_path / "out"
    with stopped_at_the_index(), pytest.raises(KeyboardInterrupt):
        build_shards(*source, out, samples_per_shard=2)
    assert len(list(out.glob("*.tar"))) == 6
    build_shards(*source, out, samples_per_shard=5)
    build_shards(*source, tmp_path / "fresh", samples_per_shard=5)
    assert contents(out) == contents(tmp_path / "fresh")


def test_build_of_a_folder_that_another_process_builds_is_refused(tmp_path: Path) -> None:
    """Both would write and remove the same files, and the folder could lack one at the end."""
    source, out = write_coco(tmp_path), tmp_path / "out"
    other = Output(str(out))
    other.prepare()
    with pytest.raises(ShardError, match=str(out)):
        build_shards(*source, out)
    assert (out / BUILD).is_dir()
    other.release()
    assert len(build_shards(*source, out)) == 12


def test_build_fault_keeps_finished_shards(tmp_path: Path) -> None:
    source, out = write_coco(tmp_path), tmp_path / "out"
    path = source[1] / "some_80.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:-150])
    with pytest.raises(ShardError, match=r"some_80\.jpg"):
        build_shards(*source, out, samples_per_shard=5)
    path.write_bytes(whole)
    assert written(lambda: build_shards(*source, out, samples_per_shard=5)) == ["000002"]
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".json", ".npy", ".tar", ".tar", ".tar"]


def test_build_broken_upload_is_retried_and_repeated(tmp_path: Path) -> None:
    source, url = write_coco(tmp_path), "memory://broken/train"
    build_shards(*source, tmp_path / "a", samples_per_shard=5)
    store = fsspec.filesystem("memory")
    lost = "000000.tar"  # for one attempt; the second tar is lost for good

    def upload(local: str, remote: str, put: Any = store.put_file) -> None:
        nonlocal lost
        put(local, remote)
        if remote.endswith(lost):  # as a store without atomic writes leaves it
            lost = "000001.tar"
            store.pipe_file(remote, store.cat_file(remote)[:5120])
            raise OSError("connection reset by peer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "put_file", upload)
        patch.setattr(retry.time, "sleep", lambda _: None)
        with pytest.raises(ShardError, match=r"memory://broken/train/.*000001\.tar: connection reset"):
            build_shards(*source, url, samples_per_shard=5)
        with pytest.raises(ShardError, match=rf"{url} .*jobs\.shard build"):
            load_index(url)
    assert written(lambda: build_shards(*source, url, samples_per_shard=5)) == ["000001", "000002"]
    found = {path.rpartition("/")[2]: store.cat(path) for path in store.find("/broken/train")}
    assert found == contents(tmp_path / "a")
