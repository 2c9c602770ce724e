"""Which CUDA kernels of the operator run: the shipped ones, or others that wait for a GPU to decide about them.

`$DEFORMABLE_OP_KERNELS` chooses them for a run, such as `specialised,sectors`; docs/gpu.md describes each. Where a
kernel does not support the sizes of a call, the shipped one runs. OpError names a word that is no kernel.
"""

import ctypes
import enum
import os
from pathlib import Path

from pipeline.errors import OpError

VARIABLE = "DEFORMABLE_OP_KERNELS"


class Kernels(enum.Flag):
    """The bits of `Kernels` in ms_deform_attn_launch.cuh."""

    SHIPPED = 0
    GENERIC = 1
    """Any size and type, one warp per row: how the others are checked."""
    SPECIALISED = 2
    """Forward for 4 levels, 4 points, 32 channels and reference points."""
    SECTORS = 4
    """Backward of bf16 and fp16 whose reductions fill sectors of 32 bytes."""
    LARGE_TILES = 8
    """A block works on 16 x 16 queries of the encoder instead of 8 x 8 or 16 x 8."""
    NEIGHBOURS = 16
    """Neighbouring tiles run on one processor."""


def parse_kernels(names: str) -> Kernels:
    """The choice that `names` is: words of `Kernels` with commas between them; empty or `shipped` are the shipped ones.

    Raises:
        OpError: a word is no kernel.
    """
    found = Kernels.SHIPPED
    for word in filter(None, (part.strip().lower() for part in names.split(","))):
        known = {name.lower(): kernel for name, kernel in Kernels.__members__.items()}
        if word not in known:
            raise OpError(f"{VARIABLE} holds '{word}', which is no kernel; it takes {', '.join(known)}")
        found |= known[word]
    return found


def requested_kernels() -> Kernels:
    """The environment's choice. Raises OpError as `parse_kernels`."""
    return parse_kernels(os.environ.get(VARIABLE, ""))


def choose_kernels(library: Path, wanted: Kernels | None = None) -> Kernels:
    """Let the CUDA `library` of this process run `wanted`; returns its choice, also without `wanted`."""
    entry = ctypes.CDLL(os.fspath(library)).msda_cuda_kernels
    entry.argtypes, entry.restype = [ctypes.c_int64], ctypes.c_int64
    return Kernels(entry(-1 if wanted is None else wanted.value))
