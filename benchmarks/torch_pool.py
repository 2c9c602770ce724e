"""The loader's pool with `torch.utils.data.DataLoader` in place of own processes: what `benchmarks.loader_step` tries.

Same requests, same batches in the same order, same faults. `TensorPool` hands pixels over as DataLoader does it, as a
tensor in shared memory; `SlotPool` in the loader's slots. All else travels as arrays, which pickle by value and take
less time than a tensor each.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.data.batch import Batch, Packed
from pipeline.data.dataset import DetectionDataset
from pipeline.data.groups import Request, make
from pipeline.data.slots import Lender, SharedSlots
from pipeline.errors import PipelineError

PREFETCH = 2  # groups in work per process, as in the loader's own pool
HELD = 4  # batches that may keep their slot, as there


class TensorPool:
    """Makes pad groups in `workers` processes of a DataLoader, at least one."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._sources: list[DetectionDataset] = []
        self._queue = _Queue()
        self._loader: DataLoader[Any] | None = None
        _context()
        forkserver.ensure_running()

    def add(self, source: DetectionDataset) -> int:
        """Make a data set known; returns its number."""
        for number, known in enumerate(self._sources):
            if known.identity == source.identity:
                return number
        self._sources.append(source)
        self._loader = None
        return len(self._sources) - 1

    def run(self, requests: Iterable[Request], largest: int) -> Iterator[Batch]:
        """The batches of `requests`, in their order; no group has more than `largest` bytes of pixels."""
        if self._loader is None:
            self._loader = self._start(self._data_set(largest))
        self._queue.requests = self._sent(requests)
        for made in self._loader:
            if isinstance(made, PipelineError):
                raise made
            yield self._batch(made)

    def processes(self) -> list[int]:
        """Ids of the processes; empty before the first run."""
        iterator = self._loader._iterator if self._loader is not None else None
        return [worker.pid for worker in getattr(iterator, "_workers", [])]

    def _data_set(self, largest: int) -> Any:
        return _Groups(self._shared())

    def _sent(self, requests: Iterable[Request]) -> Iterable[Any]:
        return requests

    def _batch(self, made: Any) -> Batch:
        packed, images = made
        batch: Batch = packed.batch(images)
        return batch

    def _shared(self) -> list[DetectionDataset]:
        return [source.shared() for source in self._sources]

    def _start(self, groups: Any) -> DataLoader[Any]:
        return DataLoader(
            groups,
            batch_size=None,
            sampler=self._queue,
            num_workers=self._workers,
            collate_fn=_identity,
            generator=torch.Generator(),  # else each pass draws from the generator that dropout uses
            multiprocessing_context=_context(),
            persistent_workers=True,
            prefetch_factor=PREFETCH,
            worker_init_fn=_begin,
        )


class SlotPool(TensorPool):
    """The same with the pixels in slots."""

    def _data_set(self, largest: int) -> Any:
        in_work = self._workers * PREFETCH + 2  # also one that was received, and one that is sent before it is claimed
        slots = SharedSlots(in_work + HELD, largest)
        self._lender = Lender(slots, in_work)
        return _SlotGroups(self._shared(), slots)

    def _sent(self, requests: Iterable[Request]) -> Iterable[Any]:
        self._lender.begin()
        return ((self._lender.send(), request) for request in requests)

    def _batch(self, made: Packed) -> Batch:
        return made.batch(torch.from_numpy(self._lender.claim(made.shape)))


class _Groups:
    """The data set: an item is the pad group that a request asks for, or the error that making it raised."""

    def __init__(self, sources: list[DetectionDataset]) -> None:
        self._sources = sources

    def __getitem__(self, request: Request) -> tuple[Packed, Tensor] | PipelineError:
        images = torch.empty(
            request.shape, dtype=torch.uint8
        ).share_memory_()  # else it is copied there when it is sent
        try:
            return make(request, self._sources, images.numpy()), images
        except PipelineError as error:  # DataLoader would raise it with a traceback for its message
            return error


class _SlotGroups:
    """The data set whose items leave their pixels in a slot."""

    def __init__(self, sources: list[DetectionDataset], slots: SharedSlots) -> None:
        self._sources, self._slots = sources, slots

    def __getitem__(self, sent: tuple[int, Request]) -> Packed | PipelineError:
        slot, request = sent
        try:
            return make(request, self._sources, self._slots.pixels(slot, request.shape))
        except PipelineError as error:
            return error


class _Queue:
    """The sampler: the requests of the run that begins."""

    def __init__(self) -> None:
        self.requests: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.data.processes", __name__])
    return context


def _begin(_: int) -> None:
    """Ctrl-C is left to the training process; a worker ends with it, also if it is killed.

    DataLoader looks at the parent's pid for that: here the fork server's, which lives as long as a worker does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _identity(made: Any) -> Any:
    return made
