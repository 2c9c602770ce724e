"""Memory that the processes of a loader share: one copy of the index, and the bytes that `slots` divides.

An anonymous file, mapped by each process; it pickles to child processes by its descriptor, and vanishes with the last
of them however they end. It does not lie in /dev/shm, which containers keep small. A machine that is out of memory gets
an OSError.
"""

import dataclasses
import mmap
import os
import tempfile
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

ALIGN = 64  # bytes; every column starts on a cache line
T = TypeVar("T")


class SharedBytes:
    """`size` bytes, zero at first; a page costs memory once it is written."""

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        self.size = max(1, size)
        self._descriptor = _anonymous_file() if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self._descriptor, self.size)
        self.array: NDArray[np.uint8] = np.frombuffer(mmap.mmap(self._descriptor, self.size), np.uint8)

    def __reduce__(self) -> tuple[Callable[..., "SharedBytes"], tuple[Any, int]]:
        return _rebuild, (DupFd(self._descriptor), self.size)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class SharedArray(np.ndarray[Any, Any]):
    """A read-only array in SharedBytes: what a child process unpickles is the same memory."""

    _place: tuple[SharedBytes, int] | None

    def __new__(cls, memory: SharedBytes, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Self:
        """The bytes from `offset` on as an array."""
        length = int(np.prod(shape)) * dtype.itemsize
        array = memory.array[offset : offset + length].view(dtype).reshape(shape).view(cls)
        array._place = (memory, offset)
        array.flags.writeable = False
        return array

    def __array_finalize__(self, other: Any) -> None:
        self._place = None  # what is computed from it is an array like any other

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._place is None:
            return np.asarray(self).__reduce_ex__(protocol)
        return SharedArray, (*self._place, self.shape, self.dtype)


def share(columns: T) -> T:
    """A dataclass of arrays, copied into one SharedBytes."""
    names = [field.name for field in dataclasses.fields(columns)]  # type: ignore[arg-type]  # T is any dataclass
    arrays = {name: getattr(columns, name) for name in names}
    ends = np.cumsum([-(-array.nbytes // ALIGN) * ALIGN for array in arrays.values()], dtype=np.int64).tolist()
    memory = SharedBytes(ends[-1])
    shared = {}
    for (name, array), start in zip(arrays.items(), [0, *ends], strict=False):
        memory.array[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        shared[name] = SharedArray(memory, start, array.shape, array.dtype)
    return dataclasses.replace(columns, **shared)  # type: ignore[type-var]  # T is any dataclass


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pipeline-data", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())


def _rebuild(duplicate: Any, size: int) -> SharedBytes:
    return SharedBytes(size, duplicate.detach())
