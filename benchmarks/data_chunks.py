"""Loader and bare loop in short turns on the same views, which compares them on a machine with other load."""

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.data_peers import Bare, Copy, Loaded, options
from pipeline.config import AugmentConfig
from pipeline.data.dataset import DetectionDataset
from pipeline.data.group import Request
from pipeline.data.transforms import draw_views
from pipeline.data.worker_pool import WorkerPool


def chunk_by_chunk(copy: Copy, mode: str, micro_batch: int, rounds: int) -> tuple[float, float]:
    """Processor ms per image that one process of the bare loop and one of the loader spend on the same views.

    They take turns at every chunk of images, and the best of the rounds counts. Other load of the machine affects
    whole epochs, but not each of these short turns.
    """
    augment = AugmentConfig(resample=mode)
    data = DetectionDataset(str(copy.shards))
    views = draw_views(data.index.sizes(), 0, 0, augment)
    turn: list[int] = []  # the chunk whose turn it is
    loop: Any = Bare(copy, data, augment)
    bare = Loaded(DataLoader(loop, batch_size=None, sampler=turn, **options(1)))
    pool = WorkerPool(1)
    source = pool.add(data)
    largest = 3 * micro_batch * augment.max_size**2

    def requests() -> list[Request]:
        numbers = sorted(loop.numbers(turn[0]), key=lambda i: views[i].out_size)
        groups = [tuple(numbers[at : at + micro_batch]) for at in range(0, len(numbers), micro_batch)]
        return [Request(source, g, tuple(views[i] for i in g), mode == "fused", 0, 1.0) for g in groups]

    works = (
        (lambda: sum(bare.run(0)), bare.processes),
        (lambda: sum(map(len, pool.run(requests(), largest))), pool.processes),
    )
    spent = [0.0, 0.0]
    for chunk in range(len(loop)):
        turn[:] = [chunk]
        best = [float("inf")] * 2
        for _ in range(rounds):
            for which, (work, processes) in enumerate(works):
                if not chunk:
                    work()  # starts the process
                before = sum(map(running_ms, processes()))
                work()
                best[which] = min(best[which], sum(map(running_ms, processes())) - before)
        spent = [total + least for total, least in zip(spent, best, strict=True)]
    return spent[0] / len(data), spent[1] / len(data)


def running_ms(pid: int) -> float:
    """Processor time of all threads of a process; `cpu_times` counts in steps of 10 ms."""
    return (
        sum(int(task.read_text(encoding="utf-8").split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))
        / 1e6
    )
