"""The pool: requests in order, pixels that stay what they were, processes that start once and end after a fault."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data import write_shards

from pipeline.data.batch import Batch
from pipeline.data.dataset import DetectionDataset
from pipeline.data.group import Request
from pipeline.data.transforms import View
from pipeline.data.worker_pool import PREFETCH_GROUPS, WorkerPool
from pipeline.errors import ShardError

LARGEST = 2 * 3 * 96 * 96


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return DetectionDataset(write_shards(tmp_path_factory.mktemp("workers"), images=12).folder)


def request(data: DetectionDataset, samples: tuple[int, ...], group: int = 0, source: int = 0) -> Request:
    return Request(source, samples, tuple(View(False, data.size(i)) for i in samples), False, group, 1.0)


def requests(data: DetectionDataset, count: int) -> list[Request]:
    return [request(data, ((7 * n) % 12, (5 * n + 1) % 12), n) for n in range(count)]


def equal(a: Batch, b: Batch) -> bool:
    names = ("images", "mask", "boxes_cxcywh", "labels", "target_offsets", "image_ids", "sizes")
    return a.group == b.group and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_run_with_processes_yields_the_same_batches_and_keeps_their_pixels(data: DetectionDataset) -> None:
    """Slots are used again and again; a batch that was handed out is not written over, kept or not."""
    here, there = WorkerPool(0), WorkerPool(2)
    for pool in (here, there):
        assert pool.add(data) == 0
    expected = list(here.run(requests(data, 30), LARGEST))
    left = there.run(iter(requests(data, 30)), LARGEST)
    kept = [next(left) for _ in range(3)]
    found = list(there.run(iter(requests(data, 30)), LARGEST))
    assert [batch.group for batch in found] == list(range(30))
    assert all(equal(a, b) for a, b in zip(expected + expected[:3], found + kept, strict=True))
    passing = there.run(iter(requests(data, 30)), LARGEST)
    assert all(equal(a, next(passing)) for a in expected)
    shown = np.asarray(data.sample(0).image).transpose(2, 0, 1)
    height, width = data.size(0)
    assert torch.equal(expected[0].images[0, :, :height, :width], torch.from_numpy(shown.copy()))


def test_run_reads_requests_a_few_ahead(data: DetectionDataset) -> None:
    asked = 0

    def counted() -> Iterator[Request]:
        nonlocal asked
        for made in requests(data, 40):
            asked += 1
            yield made

    pool = WorkerPool(1)
    pool.add(data)
    for number, _ in enumerate(pool.run(counted(), LARGEST), start=1):
        assert asked <= number + PREFETCH_GROUPS


def test_add_of_an_equal_data_set_returns_its_number(data: DetectionDataset, tmp_path: Path) -> None:
    other = DetectionDataset(write_shards(tmp_path, images=3).folder)
    pool = WorkerPool(1)
    assert [pool.add(data), pool.add(other), pool.add(DetectionDataset(data.index.folder))] == [0, 1, 0]
    assert pool.add(DetectionDataset(data.index.folder, labels="raw")) == 2, "other labels, other samples"
    assert pool.processes() == []
    made = list(pool.run([request(data, (0,)), request(other, (1,), source=1)], LARGEST))
    assert [int(batch.image_ids) for batch in made] == [3, 10]


def test_processes_stay_while_groups_fit_the_slots(data: DetectionDataset) -> None:
    pool = WorkerPool(1)
    pool.add(data)
    list(pool.run(requests(data, 2), LARGEST))
    processes = pool.processes()
    list(pool.run(requests(data, 2), LARGEST // 2))
    assert pool.processes() == processes
    list(pool.run(requests(data, 2), LARGEST * 2))
    assert pool.processes() != processes, "larger slots need new processes"


def test_run_on_a_damaged_shard_raises_its_error_and_ends_the_processes(tmp_path: Path) -> None:
    data = DetectionDataset(write_shards(tmp_path, images=12).folder)
    pool = WorkerPool(2)
    pool.add(data)
    first = pool.run(requests(data, 9), LARGEST)
    next(first)
    processes = [Path("/proc") / str(pid) for pid in pool.processes()]
    path = Path(data.index.folder) / data.index.shards[2].name
    os.truncate(path, 100)
    begun = time.monotonic()
    message = rf"^{path} .*\b\d{{12}}\)$"
    with pytest.raises(ShardError, match=message):
        list(pool.run([request(data, (11,))] * 3, LARGEST))
    assert pool.processes() == []
    del first
    if Path("/proc/self").is_dir():
        assert not any(process.exists() for process in processes)
    assert time.monotonic() - begun < 30


def test_run_with_a_killed_process_names_the_signal_and_the_next_run_starts_new_ones(data: DetectionDataset) -> None:
    pool = WorkerPool(2)
    pool.add(data)
    first = pool.run(requests(data, 30), LARGEST)
    next(first)
    killed = pool.processes()
    os.kill(killed[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"signal 9\b.*data\.workers"):
        list(first)
    assert [batch.group for batch in pool.run(requests(data, 5), LARGEST)] == list(range(5))
    assert not set(killed) & set(pool.processes())


def test_run_with_a_bug_in_a_process_raises_its_traceback(data: DetectionDataset) -> None:
    pool = WorkerPool(1)
    pool.add(data)
    with pytest.raises(IndexError, match=r"(?s)worker process 0\..*group\.py.*list index out of range"):
        list(pool.run([request(data, (0,), source=7)], LARGEST))
    assert len(list(pool.run(requests(data, 3), LARGEST))) == 3


def test_processes_ignore_ctrl_c(data: DetectionDataset) -> None:
    """A terminal sends it to all processes; the training process may still want to finish its step."""
    pool = WorkerPool(2)
    pool.add(data)
    run = pool.run(requests(data, 20), LARGEST)
    for _ in range(4):
        next(run)  # each has made a group, so both have started
    processes = pool.processes()
    for pid in processes:
        os.kill(pid, signal.SIGINT)
    assert len(list(run)) == 16
    assert len(list(pool.run(requests(data, 5), LARGEST))) == 5
    assert pool.processes() == processes


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the state of processes from /proc")
def test_processes_end_with_their_pool(data: DetectionDataset) -> None:
    pool = WorkerPool(2)
    pool.add(data)
    run = pool.run(requests(data, 20), LARGEST)
    next(run)
    processes = [Path("/proc") / str(pid) for pid in pool.processes()]
    begun = time.monotonic()
    del run, pool
    assert not any(process.exists() for process in processes)
    assert time.monotonic() - begun < 30
