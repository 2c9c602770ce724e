"""Copies the next step's batches to the GPU while the engine works on the current one (`feed`).

A thread takes a step from the loader, pins it and copies it on a side stream, still as uint8. The engine's stream waits
for that copy only; the engine normalises each batch just before it uses it. One step is on the device in advance. On
the CPU steps are passed through. Errors of the loader are raised in the consumer.
"""

import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import Protocol

import torch

from pipeline.data.batch import ON_DEVICE, Batch

Step = list[Batch]


def feed(steps: Iterable[Step], device: torch.device) -> Iterator[Step]:
    """Yield `steps` on `device`. Closing the iterator stops the thread after its current step."""
    if device.type == "cuda":
        yield from copy_ahead(steps, CudaCopier(device))
    else:
        yield from steps


class StepCopier(Protocol):
    """Copies a step to a device; tests replace it."""

    def start(self, step: Step) -> Step:
        """Start the copy; called in the thread."""

    def finish(self, step: Step) -> Step:
        """Make the copy safe to use; called in the consumer."""


class CudaCopier:
    """StepCopier on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch gives it no types
        self._done: SimpleQueue[torch.cuda.Event] = SimpleQueue()  # in the order of `start`, as `finish` is called

    def start(self, step: Step) -> Step:
        """Pin and copy; the caching allocators keep source and target alive until the copy is done."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            moved = [batch.pin_memory().copy_to(self._device) for batch in step]
            self._done.put(self._stream.record_event())
        return moved

    def finish(self, step: Step) -> Step:
        """Let the consumer's stream wait for the copy, and record for the allocator that it uses the tensors."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._done.get())
        for batch in step:
            for name in ON_DEVICE:
                getattr(batch, name).record_stream(current)
        return step


def copy_ahead(steps: Iterable[Step], copies: StepCopier) -> Iterator[Step]:
    """Yield `steps` copied by `copies`, with one step copied in advance."""
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
