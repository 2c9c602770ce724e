"""Memory that the processes of a loader share: one copy of the index, and slots for the pixels of batches.

It is an anonymous file that each process maps. It pickles to child processes by its descriptor and vanishes with the
last of them, however they end. It does not lie in /dev/shm, which containers keep small. A machine that is out of
memory gets an OSError.
"""

import dataclasses
import math
import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

ALIGN = 64  # bytes; every column starts on a cache line
T = TypeVar("T")
Pixels = NDArray[np.uint8]


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


class SharedSlots:
    """`count` slots of `size` bytes each; what a child process unpickles is the same memory."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._memory = SharedBytes(count * size)

    def pixels(self, slot: int, shape: tuple[int, ...]) -> Pixels:
        """The first bytes of a slot as an array."""
        start = slot * self.size
        return self._memory.array[start : start + math.prod(shape)].reshape(shape)


class SlotLender:
    """Says which slot a request gets, and hands its pixels out; lives in the training process.

    Each request reserves one slot. A worker process writes the pixels there, and the batch uses them in place, without
    a copy. The slot is free again when the batch's array is garbage-collected. If too few slots are free because the
    caller keeps old batches, the pixels are copied out instead, so that requests never wait for the caller.

    Args:
        slots: at least `in_work`; those above can be with batches.
        in_work: largest number of requests that were sent and whose pixels were not claimed.
    """

    def __init__(self, slots: SharedSlots, in_work: int) -> None:
        self.slots = slots
        self._in_work = in_work
        self._free = deque(range(slots.count))
        self._sent: deque[int] = deque()

    def begin(self) -> None:
        """Start anew: nobody will write or claim what was sent before."""
        self._free.extend(self._sent)
        self._sent.clear()

    def send(self) -> int:
        """A slot for one more request: the one that was free for the shortest time, as it may still be in a cache."""
        slot = self._free.pop()
        self._sent.append(slot)
        return slot

    def claim(self, shape: tuple[int, ...]) -> Pixels:
        """What was written for the request that has waited longest; it stays as it is while the array lives."""
        slot = self._sent.popleft()
        pixels = self.slots.pixels(slot, shape)
        if len(self._free) < self._in_work - len(self._sent):
            pixels = pixels.copy()
            self._free.append(slot)
        else:
            weakref.finalize(pixels, self._free.append, slot).atexit = False
        return pixels


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pipeline-data", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())


def _rebuild(duplicate: Any, size: int) -> SharedBytes:
    return SharedBytes(size, duplicate.detach())
