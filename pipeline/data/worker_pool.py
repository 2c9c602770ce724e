"""The worker processes of a loader: requests for pad groups go in, batches come out in the same order.

One pool per rank serves training and evaluation. Its processes belong to a `torch.utils.data.DataLoader`. They start
once, with the first request, and live as long as the pool. Pixels are handed over in slots of shared memory, because a
shared tensor for each batch would cost as much as the decoding. Faults of the data are ShardErrors in every process.

The processes come from a fork server: a Ray worker runs gRPC threads, and a fork of it may inherit a lock that nobody
releases. The fork server is a fresh process that imports torch once; its children start quickly and share that memory.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline.data.batch import Batch, Packed
from pipeline.data.dataset import DetectionDataset
from pipeline.data.group import Request, make_group
from pipeline.data.shared_memory import SharedSlots, SlotLender
from pipeline.errors import PipelineError

PREFETCH_GROUPS = 2  # requested ahead per process
HELD_BATCHES = 4  # that the caller may keep without a copy; with more slots, each is out of the cache when written


class WorkerPool:
    """Makes pad groups in `workers` processes, or in this one if there are none."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._sources: list[DetectionDataset] = []
        self._sampler = _Sampler()
        self._loader: DataLoader[Any] | None = None
        self._lender: SlotLender | None = None
        self._runs = 0
        if workers:  # the fork server imports torch while this process builds its model
            _context()
            forkserver.ensure_running()

    def add(self, source: DetectionDataset) -> int:
        """Make a data set known; returns its number. Processes that run without it end, and start anew with it."""
        for number, known in enumerate(self._sources):
            if known.identity == source.identity:
                return number
        self._sources.append(source)
        self._end()
        return len(self._sources) - 1

    def run(self, requests: Iterable[Request], largest: int) -> Iterator[Batch]:
        """The batches of `requests`, in their order. A run that is left half way ends when the next one begins.

        Args:
            requests: read as they are needed, a few ahead of what was yielded.
            largest: bytes of the largest group's padded images.

        Raises:
            PipelineError: what making a group raised.
            RuntimeError: a process was killed.
        """
        if not self._workers:
            yield from (self._make_here(request) for request in requests)
            return
        if self._loader is None or self._lender is None or largest > self._lender.slots.size:
            self._end()
            self._loader, self._lender = self._start(largest)
        loader, lender = self._loader, self._lender
        self._runs += 1
        this_run = self._runs
        self._sampler.items = sent = _send(requests, lender)
        try:
            for made in loader:
                if isinstance(made, PipelineError):
                    raise made
                yield made.batch(torch.from_numpy(lender.claim(made.shape)))
                assert this_run == self._runs, "another run has begun"
        except Exception as error:
            if this_run != self._runs:
                raise
            fault = self._death_of_a_process() or error
            self._end()  # now: the error's traceback may keep this pool alive
            raise fault from None
        finally:
            # The requests lead back to this pool, and the DataLoader holds them. If the garbage collector had to break
            # that circle, the DataLoader could not tell its processes to end, and would wait for 5 seconds.
            sent.close()

    def processes(self) -> list[int]:
        """Ids of the processes; empty before the first run."""
        return [process.pid for process in self._processes()]

    def _processes(self) -> list[Any]:
        iterator = self._loader._iterator if self._loader is not None else None  # nothing public lists them
        return getattr(iterator, "_workers", [])

    def _make_here(self, request: Request) -> Batch:
        images = np.empty(request.shape, np.uint8)
        return make_group(request, self._sources, images).batch(torch.from_numpy(images))

    def _start(self, largest: int) -> tuple[DataLoader[Any], SlotLender]:
        in_work = self._workers * PREFETCH_GROUPS + 1  # DataLoader sends a request before it returns a group
        slots = SharedSlots(in_work + HELD_BATCHES, largest)
        data_set: Any = _Groups([source.shared() for source in self._sources], slots)
        loader = DataLoader[Any](
            data_set,
            batch_size=None,
            sampler=self._sampler,
            num_workers=self._workers,
            collate_fn=_identity,
            generator=torch.Generator(),  # without it each run would draw from the generator that dropout uses
            multiprocessing_context=_context(),
            persistent_workers=True,
            prefetch_factor=PREFETCH_GROUPS,
            worker_init_fn=_prepare_process,
        )
        return loader, SlotLender(slots, in_work)

    def _death_of_a_process(self) -> RuntimeError | None:
        """An error that names the end of a process that nobody asked to end; None if all are alive."""
        for process in self._processes():
            if code := process.exitcode:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                return RuntimeError(
                    f"a process of the loader {how}; if memory ran out, lower data.workers or train.micro_batch"
                )
        return None

    def _end(self) -> None:
        """Let all processes finish what they are at, and wait for them."""
        if self._processes():
            assert self._loader is not None
            self._loader._iterator._shutdown_workers()  # type: ignore[union-attr]  # else garbage collection does it
        self._loader = self._lender = None


class _Sampler:
    """The DataLoader's sampler: the requests of the run that begins, each with its slot."""

    def __init__(self) -> None:
        self.items: Iterable[tuple[int, Request]] = ()

    def __iter__(self) -> Iterator[tuple[int, Request]]:
        return iter(self.items)


class _Groups:
    """The DataLoader's data set, in its processes. An item is a group, whose pixels lie in its slot."""

    def __init__(self, sources: list[DetectionDataset], slots: SharedSlots) -> None:
        self._sources, self._slots = sources, slots

    def __getitem__(self, item: tuple[int, Request]) -> Packed | PipelineError:
        slot, request = item
        try:
            return make_group(request, self._sources, self._slots.pixels(slot, request.shape))
        except PipelineError as error:  # DataLoader would raise it with the process's traceback as its message
            return error


def _send(requests: Iterable[Request], lender: SlotLender) -> Generator[tuple[int, Request]]:
    """The requests with their slots. It begins when the processes are done with those of an older run."""
    lender.begin()
    for request in requests:
        yield lender.send(), request


def _prepare_process(_: int) -> None:
    """Leave Ctrl-C to the training process, and end with it, even if it is killed.

    DataLoader watches the parent's id for that, but the parent is the fork server, which lives as long as its children.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(training_process: Any) -> None:
    training_process.join()
    os._exit(1)


def _identity(made: Any) -> Any:
    return made


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
