"""Two real processes for tests of what crosses ranks: gloo over a file, no Ray."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.runtime import Runtime


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """Run `function(runtime, *args)` on `world` new processes; returns their results.

    Raises ProcessRaisedException with the traceback of the first rank that fails, ProcessExitedException if one dies.
    Both end the other ranks, which wait for it in a collective.
    """
    prefix = folder / f"ranks_{function.__name__}_{world}"
    torch.multiprocessing.spawn(_run, (function, world, prefix, args), nprocs=world, daemon=True)
    return [pickle.loads(prefix.with_suffix(f".{rank}").read_bytes()) for rank in range(world)]


def _run(rank: int, function: Callable[..., Any], world: int, prefix: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}  # DeepSpeed reads them
    dist.init_process_group("gloo", init_method=f"file://{prefix}", rank=rank, world_size=world)
    try:
        result = function(Runtime(rank, world, rank, torch.device("cpu")), *args)
        prefix.with_suffix(f".{rank}").write_bytes(pickle.dumps(result))
    finally:
        dist.destroy_process_group()
