"""Two real processes for tests of what crosses ranks: gloo over a file, no Ray."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.runtime import Runtime


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """Run `function(runtime, *args)` on `world` new processes; returns their results, re-raises their errors."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(world) as pool:
        meeting = folder / f"rendezvous_{function.__name__}_{world}"
        jobs = [pool.apply_async(_run, (function, rank, world, meeting, args)) for rank in range(world)]
        return [job.get(timeout=300) for job in jobs]


def _run(function: Callable[..., Any], rank: int, world: int, meeting: Path, args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}  # DeepSpeed reads them
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        return function(Runtime(rank, world, rank, torch.device("cpu")), *args)
    finally:
        dist.destroy_process_group()
