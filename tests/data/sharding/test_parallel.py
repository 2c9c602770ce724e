"""Work in this process or in Ray tasks gives the same result; errors are unchanged and end the other tasks."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.data import contents, pack, write_coco
from support.layouts import draw_truth, pack_tree, write_roboflow_coco
from support.paths import ROOT

from pipeline.data.importing.build import build_dataset
from pipeline.data.importing.dataset import Options, read_dataset
from pipeline.data.sharding import parallel
from pipeline.data.sharding.lint import examine
from pipeline.data.sharding.rules import Rule
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.verify import verify_shards
from pipeline.errors import ResourceError, ShardError

# Ray leaves sockets and processes of its own to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def three_cpus() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def double(number: int) -> int:
    return 2 * number


def test_run_one_worker_imports_no_ray() -> None:
    assert list(parallel.run(double, [3, 1, 2], workers=1)) == [(0, 6), (1, 2), (2, 4)]


def test_run_more_workers_than_cpus_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    annotations, folder = write_coco(tmp_path)
    build_shards(annotations, folder, tmp_path / "built")
    for action in (
        lambda: build_shards(annotations, folder, tmp_path / "out", workers=999),
        lambda: verify_shards(str(tmp_path / "built"), workers=999),
        lambda: examine(annotations, str(folder), decode=True, workers=999),
    ):
        with pytest.raises(ResourceError, match="--workers 999"):
            action()
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("three_cpus")
def test_build_three_workers_write_same_bytes(tmp_path: Path) -> None:
    annotations, folder = write_coco(tmp_path)
    build_shards(annotations, folder, tmp_path / "one", samples_per_shard=2)
    expected = contents(tmp_path / "one")
    assert len(expected) == 6 + 3
    packed = pack(folder, tmp_path / "images.zip", "train2017/")
    for number, (images, out) in enumerate(
        ((folder, str(tmp_path / "0")), (folder, f"file://{tmp_path}/1"), (packed, str(tmp_path / "2")))
    ):
        build_shards(annotations, images, out, samples_per_shard=2, workers=3)
        assert contents(tmp_path / str(number)) == expected, "every byte: tars, index, sidecar, summary"
        assert verify_shards(out, workers=3) == []


@pytest.mark.ray
@pytest.mark.usefixtures("three_cpus")
def test_build_dataset_three_workers_find_and_write_the_same(tmp_path: Path) -> None:
    (*_, first), train = draw_truth({"train": 1})["train"], draw_truth({"train": 8})["train"]
    Image.open(io.BytesIO(first.data)).save(tmp_path / "twin.webp", lossless=True)
    twin = dataclasses.replace(first, name="twin.webp", data=(tmp_path / "twin.webp").read_bytes())
    write_roboflow_coco({"train": train, "val": [twin]}, tmp_path / "export")
    archive = str(pack_tree(tmp_path / "export", tmp_path / "export.zip"))
    found = [list(read_dataset(archive, Options(), decode=True, workers=workers).findings) for workers in (1, 3)]
    assert found[0] == found[1]
    assert {Rule.CONVERTED, Rule.NEAR_DUPLICATE} <= {rule for rule, _, _ in found[0]}
    for workers in (1, 3):
        build_dataset(archive, tmp_path / f"{workers}", Options(), samples_per_shard=2, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.ray
@pytest.mark.usefixtures("three_cpus")
def test_build_fault_in_worker_is_raised_unchanged(tmp_path: Path) -> None:
    source = write_coco(tmp_path)
    with pytest.raises(ResourceError, match=r"--workers 4\b.*\b3\b"):
        build_shards(*source, tmp_path / "out", workers=4)
    path = tmp_path / "images" / "some_3.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ShardError, match=r"^images-\w+-000000\.tar .*some_3\.jpg"):
        build_shards(*source, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
    found = examine(*(source[0], str(source[1])), decode=True, workers=2).findings
    assert [(count, example) for rule, count, (example, *_) in found if rule is Rule.UNREADABLE_FILE] == [
        (1, "some_3.jpg does not decode: " + example_of(found))
    ]


def example_of(found: Any) -> str:
    (text,) = [examples[0] for rule, _, examples in found if rule is Rule.UNREADABLE_FILE]
    return str(text).partition("does not decode: ")[2]


@pytest.mark.ray
@pytest.mark.usefixtures("three_cpus")
def test_run_killed_worker_is_replaced(tmp_path: Path) -> None:
    def die_once(marker: str) -> int:
        """Ends its process silently the first time, as the kernel does when memory is short."""
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return 7
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    assert list(parallel.run(die_once, [str(tmp_path / "marker")], workers=2)) == [(0, 7)]


@pytest.mark.ray
@pytest.mark.usefixtures("three_cpus")
def test_run_error_cancels_other_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    late, started = tmp_path / "late", tmp_path / "started"
    cancel, cancelled = ray.cancel, []

    def cancel_if_running(reference: Any, **options: Any) -> None:
        assert ray.wait([reference], timeout=0)[0] == [], "to cancel a finished task may abort the process"
        cancelled.append(reference)
        cancel(reference, **options)

    monkeypatch.setattr(ray, "cancel", cancel_if_running)

    def fail_or_write_late(path: str) -> None:
        if path:
            started.touch()
            time.sleep(3)
            Path(path).write_text("late")
        while not started.exists():
            time.sleep(0.05)
        raise ShardError("no")

    with pytest.raises(ShardError, match=r"^no$"):
        list(parallel.run(fail_or_write_late, [str(late), "", str(late)], workers=2))
    assert len(cancelled) == 1
    time.sleep(4)
    assert not late.exists()


@pytest.mark.slow
@pytest.mark.ray
def test_build_cluster_nodes_write_same_bytes(tmp_path: Path) -> None:
    """A head that runs no tasks and two nodes, reached as a user does: by RAY_ADDRESS."""
    from ray.cluster_utils import Cluster

    annotations, folder = write_coco(tmp_path)
    build_shards(annotations, folder, tmp_path / "one", samples_per_shard=2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        for out in (str(tmp_path / "shared"), f"file://{tmp_path}/url"):
            words = ["build", str(annotations), str(folder), out, "--samples-per-shard", "2", "--workers", "2"]
            environment = {**os.environ, "RAY_ADDRESS": cluster.address}
            subprocess.run([sys.executable, "-m", "jobs.shard", *words], check=True, cwd=ROOT, env=environment)
    finally:
        cluster.shutdown()
    assert contents(tmp_path / "shared") == contents(tmp_path / "url") == contents(tmp_path / "one")


def damaged(number: int) -> int:
    raise ShardError(f"shard {number} is damaged")


def test_run_fault_after_start_exits_with_1() -> None:
    with pytest.raises(ShardError) as caught:
        list(parallel.run(damaged, [3], workers=1))
    assert caught.value.exit_code == 1
