"""The processes that read, decode and augment: requests for pad groups go in, batches come out in the same order.

One pool per rank serves training and evaluation; its processes start once, with the first request, and live as long as
the pool. Pixels are handed over in `slots` of shared memory that are used again and again: a tensor of its own per
batch would cost a descriptor and fresh pages each time, as much as the decoding. Used by `loader`. Faults of the data
are `ShardError`s and reach the training process as such, whichever process met them.

The processes come from a fork server, not from fork: a Ray worker runs gRPC threads, and a fork of it may inherit a
lock that nobody will release. The fork server is a fresh process that imports torch once; its children start quickly,
share that memory, and end when the training process dies.
"""

import multiprocessing
import os
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline.data.batch import Batch, Item, Packed, pack, padded_shape
from pipeline.data.dataset import DetectionDataset
from pipeline.data.resample import apply_fused, decoded_size
from pipeline.data.slots import Lender, SharedSlots
from pipeline.data.transforms import View, apply
from pipeline.errors import PipelineError

PREFETCH = 2  # groups in work per process
HELD = 4  # batches that the consumer may hold before they are copied; with many slots each is cold when it is written


@dataclass(frozen=True)
class Request:
    """One pad group to make: all that a worker needs to know."""

    source: int  # number that `WorkerPool.add` gave the data set
    samples: tuple[int, ...]  # positions in its index
    views: tuple[View, ...]
    fused: bool  # see `resample`
    group: int
    weight: float


class WorkerPool:
    """Makes pad groups in `workers` processes, or in this one if there are none."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._sources: list[DetectionDataset] = []
        self._queue = _Queue()
        self._loader: DataLoader[Any] | None = None
        self._lender: Lender | None = None
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
        self._loader = None
        return len(self._sources) - 1

    def run(self, requests: Iterable[Request], largest: int) -> Iterator[Batch]:
        """The batches of `requests`, in their order. A run that is left half way ends when the next one begins.

        Args:
            requests: read as they are needed, a few ahead of what was yielded.
            largest: bytes of the largest group's padded images.

        Raises:
            PipelineError: what making a group raised.
        """
        if not self._workers:
            maker = _GroupMaker(self._sources, None)
            yield from (maker.batch(request) for request in requests)
            return
        if self._loader is None or self._lender is None or largest > self._lender.slots.size:
            self._loader, self._lender = self._start(largest)
        self._runs += 1
        this_run, lender = self._runs, self._lender
        self._queue.items = sent = _sent(requests, lender)
        try:
            for made in self._loader:
                assert this_run == self._runs, "another run has begun"
                if isinstance(made, PipelineError):
                    self._loader = None  # ends its processes, although the error's traceback may keep this pool alive
                    raise made
                yield made.batch(torch.from_numpy(lender.claim(made.shape)))
        finally:
            # The requests lead back to this pool, and the DataLoader holds them. Were that circle left to the garbage
            # collector, the DataLoader could no longer tell its processes to end, and would wait for 5 seconds.
            sent.close()

    def processes(self) -> list[int]:
        """Ids of the processes; empty before the first run."""
        iterator = self._loader._iterator if self._loader is not None else None
        return [worker.pid for worker in getattr(iterator, "_workers", [])]

    def _start(self, largest: int) -> tuple["DataLoader[Any]", Lender]:
        in_work = self._workers * PREFETCH + 2  # also one that was received, and one that is sent before it is claimed
        slots = SharedSlots(in_work + HELD, largest)
        loader = DataLoader[Any](
            _GroupMaker([source.shared() for source in self._sources], slots),  # type: ignore[arg-type]  # only __getitem__
            batch_size=None,
            sampler=self._queue,
            num_workers=self._workers,
            collate_fn=_identity,
            generator=torch.Generator(),  # else each pass draws from the global generator, and dropout would change
            multiprocessing_context=_context(),
            persistent_workers=True,
            prefetch_factor=PREFETCH,
            worker_init_fn=_die_with_parent,
        )
        return loader, Lender(slots, in_work)


class _GroupMaker:
    """What the DataLoader calls its data set: runs in the pool's processes."""

    def __init__(self, sources: list[DetectionDataset], slots: SharedSlots | None) -> None:
        self._sources, self._slots = sources, slots

    def __getitem__(self, numbered: tuple[int, Request]) -> Packed | PipelineError:
        slot, request = numbered
        assert self._slots is not None
        images = self._slots.pixels(slot, padded_shape([view.out_size for view in request.views]))
        # DataLoader re-raises an exception with the worker's traceback as its message; as a value it stays readable.
        try:
            return pack(self._items(request), images, request.group, request.weight)
        except PipelineError as error:
            return error

    def batch(self, request: Request) -> Batch:
        """The group, made in this process."""
        images = np.empty(padded_shape([view.out_size for view in request.views]), np.uint8)
        return pack(self._items(request), images, request.group, request.weight).batch(torch.from_numpy(images))

    def _items(self, request: Request) -> Iterator[Item]:
        make = self._fused if request.fused else self._reference
        source = self._sources[request.source]
        return (make(source, i, view) for i, view in zip(request.samples, request.views, strict=True))

    def _reference(self, source: DetectionDataset, i: int, view: View) -> Item:
        sample = source.sample(i)
        image, boxes, labels = apply(sample.image, sample.boxes_xyxy, sample.labels, view)
        return Item(image, boxes, labels, sample.image_id, sample.size)

    def _fused(self, source: DetectionDataset, i: int, view: View) -> Item:
        size = source.size(i)
        sample = source.sample(i, at_least=decoded_size(view, size))
        image, boxes, labels = apply_fused(sample.image, sample.shrink, sample.boxes_xyxy, sample.labels, view, size)
        return Item(image, boxes, labels, sample.image_id, size)


class _Queue:
    """The DataLoader's sampler: the requests to work through next. A plain list would be copied when it is made."""

    def __init__(self) -> None:
        self.items: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def _context() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _sent(requests: Iterable[Request], lender: Lender) -> Generator[tuple[int, Request]]:
    """The requests with their slots. It begins when the processes are done with those of an older run."""
    lender.begin()
    for request in requests:
        yield lender.send(), request


def _die_with_parent(worker: int) -> None:
    """End this worker when the training process is gone, even by SIGKILL.

    DataLoader's own watch looks at the parent's pid: here the fork server's, which lives as long as a worker does.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _identity(made: Any) -> Any:
    return made
