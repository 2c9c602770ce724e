"""The next step's batches on their way to the GPU while it works on this one: `feed`, between loader and engine.

A thread takes a step from the loader, puts it into page-locked memory and copies it on a stream of its own, still
uint8; the engine's stream waits for that copy only, and the engine normalises each batch when its turn comes. One step
is on the device ahead of the one in work. On the CPU there is nothing to overlap, and steps pass through. Used by
`worker`. What the loader raises is raised to the consumer in its place.
"""

import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import Protocol

import torch

from pipeline.data.batch import ON_DEVICE, Batch

Step = list[Batch]


def feed(steps: Iterable[Step], device: torch.device) -> Iterator[Step]:
    """`steps`, each on `device` in time. Closing the iterator stops the thread after the step in its hands."""
    if device.type == "cuda":
        yield from feed_through(steps, CudaCopies(device))
    else:
        yield from steps


class Copies(Protocol):
    """How a step gets to a device; a test puts its own in place."""

    def start(self, step: Step) -> Step:
        """Begin to copy; called by the feeding thread."""

    def finish(self, step: Step) -> Step:
        """Make the copy safe to use; called by the consumer."""


class CudaCopies:
    """Copies on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done: SimpleQueue[torch.cuda.Event] = SimpleQueue()  # in the order of `start`, as `finish` is called

    def start(self, step: Step) -> Step:
        """Pin and copy; the caching allocators keep both ends alive until the copy is over."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            moved = [batch.pin_memory().copy_to(self._device) for batch in step]
            self._done.put(self._stream.record_event())
        return moved

    def finish(self, step: Step) -> Step:
        """Let the consumer's stream wait for the copy, and tell the allocator that it uses the tensors."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._done.get())
        for batch in step:
            for name in ON_DEVICE:
                getattr(batch, name).record_stream(current)
        return step


def feed_through(steps: Iterable[Step], copies: Copies) -> Iterator[Step]:
    """`steps` through `copies`, one ahead."""
    ready: SimpleQueue[Step | BaseException | None] = SimpleQueue()
    free = threading.Semaphore(1)  # steps that may be copied before the consumer takes one
    closed = threading.Event()

    def work() -> None:
        try:
            for step in steps:
                free.acquire()
                if closed.is_set():
                    return
                ready.put(copies.start(step))
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        while (step := ready.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            free.release()
            yield copies.finish(step)
    finally:
        closed.set()
        free.release()
        thread.join()
