"""Rank, world, device and threads of this process: resolved once, at the start of a worker or a test, and passed on.

Nothing else in the project reads RANK or selects a CUDA device, so two parts cannot disagree. A missing CUDA device is
a ResourceError.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import ResourceError

if TYPE_CHECKING:  # loggers are made from here by modules that check a command's input, which needs no torch
    import torch


@dataclass(frozen=True)
class Runtime:
    """The position of this process in its worker group."""

    rank: int
    world: int
    local_rank: int
    device: "torch.device"

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes metrics and results."""
        return self.rank == 0


def single(device: str = "cpu") -> Runtime:
    """A world of one process, for benchmarks, prediction and tests."""
    import torch

    return Runtime(rank=0, world=1, local_rank=0, device=torch.device(device))


def from_environment(use_gpu: bool, threads: int) -> Runtime:
    """Read Ray Train's environment variables, select the device, set the number of CPU threads.

    Raises:
        ResourceError: `use_gpu` without a visible CUDA device.
    """
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_gpu:
        if not torch.cuda.is_available():
            raise ResourceError("scaling.use_gpu is true but no CUDA device is visible; set scaling.use_gpu=false")
        import ray.train.torch  # only here: the engine and model run without Ray

        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Runtime(rank, world, local_rank, device)


def make_deterministic() -> None:
    """`train.deterministic`: the same bits in every run on the same hardware. Before the process's first CUDA call.

    A CPU is always deterministic. On a GPU, torch and our operator (its backward adds in a fixed order) use slower
    deterministic kernels. An operation without one raises torch's own RuntimeError, which names it; examples are
    `model.op=torch` and BiFPN's pooling.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at the first call
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
