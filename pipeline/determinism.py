"""`train.deterministic`: the same bits in every run on the same hardware.

A CPU is deterministic as it is. On a GPU, torch and our operator (`ms_deform_attn`'s backward adds in a fixed order)
take their slower ways; an operation that has none raises torch's own RuntimeError, which names it: `model.op=torch`
and BiFPN's pooling are such.
"""

import os

import torch


def make_deterministic() -> None:
    """Switch this process over; before its first CUDA call, because cuBLAS reads its workspace setting once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
