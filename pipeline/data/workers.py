"""The processes that read, decode and augment: requests for pad groups go in, batches come out in the same order.

One pool per rank serves training and evaluation; its processes start once, with the first request, and live as long as
the pool. Pixels are handed over in `slots` of shared memory, all else through a pipe to each process: the queues of
torch's DataLoader, with their threads and locks, take 0.4 ms more of a process for a batch, 3% of what two images take.
Used by `loader`. Faults of the data are `ShardError`s and reach the training process as such, whichever process met
them.

The processes come from a fork server, not from fork: a Ray worker runs gRPC threads, and a fork of it may inherit a
lock that nobody will release. The fork server is a fresh process that imports torch once; its children start quickly
and share that memory. They end when their pipe does, so also when the training process dies.
"""

import itertools
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

import numpy as np
import torch

from pipeline.data.batch import Batch, Packed
from pipeline.data.dataset import DetectionDataset
from pipeline.data.groups import Request, make
from pipeline.data.slots import Lender, SharedSlots
from pipeline.errors import PipelineError

PREFETCH = 2  # groups in work per process
HELD = 4  # batches that the consumer may hold before they are copied; with many slots each is cold when it is written
PATIENCE = 5  # seconds for a process to end by itself


class WorkerPool:
    """Makes pad groups in `workers` processes, or in this one if there are none."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._sources: list[DetectionDataset] = []
        self._team: _Team | None = None
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
        if self._team is None or largest > self._team.room:
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
        self.room = largest
        self._in_work = workers * PREFETCH
        slots = SharedSlots(self._in_work + HELD, largest)
        self._lender = Lender(slots, self._in_work)
        shared = [source.shared() for source in sources]
        self._members = [_Member(shared, slots) for _ in range(workers)]
        self._busy: deque[_Member] = deque()  # once for each request, in their order
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

    def _send(self, requests: Iterable[tuple["_Member", Request]]) -> None:
        for member, request in requests:
            member.send(self._lender.send(), request)
            self._busy.append(member)

    def processes(self) -> list[int]:
        """Their ids."""
        return [member.process.pid or 0 for member in self._members]

    def end(self) -> None:
        """Let all processes finish what they are at, and wait for them."""
        for member in self._members:
            member.pipe.close()
        for member in self._members:
            member.process.join(PATIENCE)
            if member.process.is_alive():  # waits for storage
                member.process.kill()
                member.process.join()


class _Member:
    """One process, seen from the training process. A pipe holds some hundred KB, a request has 100 bytes per image."""

    def __init__(self, sources: list[DetectionDataset], slots: SharedSlots) -> None:
        self.pipe, theirs = _context().Pipe()
        self.process = _context().Process(target=_work, args=(theirs, sources, slots), daemon=True)
        self.process.start()
        theirs.close()  # else it would be open here when the process is gone, and `receive` would wait

    def send(self, slot: int, request: Request) -> None:
        """Ask for a group, to be written into `slot`."""
        try:
            self.pipe.send((slot, request))
        except OSError:
            raise self._gone() from None

    def receive(self) -> Packed | Exception:
        """The group that was asked for first, or what making it raised."""
        try:
            made: Packed | Exception = self.pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        return made

    def _gone(self) -> RuntimeError:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return RuntimeError(
            f"a process of the loader {how}; if memory ran out, lower data.workers or train.micro_batch"
        )


def _work(pipe: Connection, sources: list[DetectionDataset], slots: SharedSlots) -> None:
    """What a process does: groups, until the training process closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the training process says when to end
    torch.set_num_threads(1)
    try:
        while True:
            slot, request = pipe.recv()
            pipe.send(_made(request, sources, slots.pixels(slot, request.shape)))
    except (EOFError, OSError):
        return


def _made(request: Request, sources: list[DetectionDataset], images: np.ndarray) -> Packed | Exception:
    try:
        return make(request, sources, images)
    except PipelineError as error:
        return error
    except Exception:  # its traceback would be lost on the way
        return RuntimeError(f"in process {os.getpid()} of the loader: {traceback.format_exc()}")


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
