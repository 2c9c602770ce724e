"""Loader and bare loop in short turns on the same views: what `benchmarks.data` says of them on a restless machine.

The loader comes with each of `POOLS`: its own processes, and those of torch's DataLoader.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.data_peers import Bare, Copy, Loaded, options
from benchmarks.torch_pool import SlotPool, TensorPool
from pipeline.config import AugmentConfig
from pipeline.data.dataset import DetectionDataset
from pipeline.data.groups import Request
from pipeline.data.transforms import draw_views
from pipeline.data.workers import WorkerPool

POOLS: dict[str, Any] = {"pool": WorkerPool, "DataLoader": TensorPool, "DataLoader with slots": SlotPool}


def chunk_by_chunk(copy: Copy, mode: str, micro_batch: int, rounds: int) -> dict[str, float]:
    """Processor ms per image that one process of the bare loop and one of the loader spend on the same views.

    They take turns at every chunk of pictures, and the best of the rounds counts: what else goes on in the machine
    hits whole epochs, but not each of these short turns. What this process spends beside it is counted by itself.
    """
    augment = AugmentConfig(resample=mode)
    data = DetectionDataset(str(copy.shards))
    views = draw_views(data.index.sizes(), 0, 0, augment)
    turn: list[int] = []  # the chunk whose turn it is
    loop: Any = Bare(copy, data, augment)
    bare = Loaded(DataLoader(loop, batch_size=None, sampler=turn, **options(1)))
    pools = {name: kind(1) for name, kind in POOLS.items()}
    for pool in pools.values():
        pool.add(data)
    largest = 3 * micro_batch * augment.max_size**2

    def requests() -> list[Request]:
        numbers = sorted(loop.numbers(turn[0]), key=lambda i: views[i].out_size)
        groups = [tuple(numbers[at : at + micro_batch]) for at in range(0, len(numbers), micro_batch)]
        return [Request(0, g, tuple(views[i] for i in g), mode == "fused", 0, 1.0) for g in groups]

    works: dict[str, Any] = {"bare": (lambda: sum(bare.run(0)), bare.processes)}
    for name, pool in pools.items():
        works[name] = (partial(_work_through, pool, requests, largest), pool.processes)
    spent = dict.fromkeys([*works, *(f"{name}, training process" for name in works)], 0.0)
    for chunk in range(len(loop)):
        turn[:] = [chunk]
        best = dict.fromkeys(spent, float("inf"))
        for _ in range(rounds):
            for name, (work, processes) in works.items():
                if not chunk:
                    work()  # starts the process
                before, own = sum(map(running_ms, processes())), running_ms(os.getpid())
                work()
                best[name] = min(best[name], sum(map(running_ms, processes())) - before)
                name = f"{name}, training process"
                best[name] = min(best[name], running_ms(os.getpid()) - own)
        for name, least in best.items():
            spent[name] += least / len(data)
    return spent


def _work_through(pool: Any, requests: Any, largest: int) -> int:
    return sum(map(len, pool.run(requests(), largest)))


def running_ms(pid: int) -> float:
    """Processor time of all threads of a process; `cpu_times` counts in steps of 10 ms."""
    return (
        sum(int(task.read_text(encoding="utf-8").split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))
        / 1e6
    )
