"""The slots of shared memory that pictures are handed over in: written by a process of the pool, read by the batch.

Used by `workers`. Slots are used again and again: a shared tensor of its own per batch would cost a descriptor and
fresh pages each time, as much as the decoding. A slot goes out with a request, and the pixels in it become the batch's
as they are: a copy costs the training process nearly as much as all else that it does for a batch. It is free again
when the pixels are gone. Requests must never wait for a consumer that keeps its batches, so where slots run short a
batch gets a copy.
"""

import math
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shared import SharedBytes

Pixels = NDArray[np.uint8]


class SharedSlots:
    """`count` slots of `size` bytes each; what a child process unpickles is the same memory."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._memory = SharedBytes(count * size)

    def pixels(self, slot: int, shape: tuple[int, ...]) -> Pixels:
        """The first bytes of a slot as an array."""
        start = slot * self.size
        return self._memory.array[start : start + math.prod(shape)].reshape(shape)


class Lender:
    """Says which slot a request gets, and hands its pixels out; lives in the training process.

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
