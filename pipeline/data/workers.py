"""The pool of processes that read, decode and augment: requests go in, batches come out in the same order.

One pool per rank serves training and evaluation; its `processes` start once, with the first request, and live as long
as the pool. Pixels are handed over in `slots` of shared memory, all else through a pipe to each process. Used by
`loader`. Faults of the data are `ShardError`s, whichever process met them.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from pipeline.data.batch import Batch
from pipeline.data.dataset import DetectionDataset
from pipeline.data.groups import Request, make
from pipeline.data.processes import GroupProcess, prepare
from pipeline.data.slots import Lender, SharedSlots

PREFETCH = 2  # groups in work per process
HELD = 4  # batches that the consumer may hold before they are copied; with many slots each is cold when it is written


class WorkerPool:
    """Makes pad groups in `workers` processes, or in this one if there are none."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._sources: list[DetectionDataset] = []
        self._team: _Team | None = None
        if workers:
            prepare()

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
        if self._team is None or largest > self._team.slots.size:
            self._end()
            self._team = _Team(self._workers, self._sources, largest)
        try:
            yield from self._team.run(requests)
        except Exception:
            self._end()  # now: the error's traceback may keep this pool alive
            raise

    def processes(self) -> list[int]:
        """Ids of the processes; empty before the first run."""
        return self._team.processes() if self._team else []

    def _make_here(self, request: Request) -> Batch:
        images = np.empty(request.shape, np.uint8)
        return make(request, self._sources, images).batch(torch.from_numpy(images))

    def _end(self) -> None:
        if self._team:
            self._team.end()
            self._team = None


class _Team:
    """Processes with their pipes, and the slots they write to."""

    def __init__(self, workers: int, sources: list[DetectionDataset], largest: int) -> None:
        self._in_work = workers * PREFETCH
        self.slots = SharedSlots(self._in_work + HELD, largest)
        self._lender = Lender(self.slots, self._in_work)
        shared = [source.shared() for source in sources]
        self._members = [GroupProcess(shared, self.slots) for _ in range(workers)]
        self._busy: deque[GroupProcess] = deque()  # once for each request, in their order
        self._runs = 0

    def run(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """See `WorkerPool.run`."""
        self._runs += 1
        this_run = self._runs
        while self._busy:  # with what an older run asked for
            self._busy.popleft().receive()
        self._lender.begin()
        to_send = zip(itertools.cycle(self._members), requests)  # members never end
        self._send(itertools.islice(to_send, self._in_work))
        while self._busy:
            made = self._busy.popleft().receive()
            if isinstance(made, Exception):
                raise made
            pixels = self._lender.claim(made.shape)
            self._send(itertools.islice(to_send, 1))
            yield made.batch(torch.from_numpy(pixels))
            assert this_run == self._runs, "another run has begun"

    def _send(self, requests: Iterable[tuple[GroupProcess, Request]]) -> None:
        for member, request in requests:
            member.send(self._lender.send(), request)
            self._busy.append(member)

    def processes(self) -> list[int]:
        """Their ids."""
        return [member.pid for member in self._members]

    def end(self) -> None:
        """Let all processes finish what they are at, and wait for them."""
        for member in self._members:
            member.close()
        for member in self._members:
            member.join()
