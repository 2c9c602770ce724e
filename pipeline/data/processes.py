"""One process that makes pad groups, and the pipe to it: requests go in, `Packed` groups come out, pixels go to slots.

Used by `workers`. The queues of torch's DataLoader, with their threads and locks, take 0.4 ms more of a process for a
batch, 3% of what two images take. Faults of the data are `ShardError`s and reach the training process as such.

The processes come from a fork server, not from fork: a Ray worker runs gRPC threads, and a fork of it may inherit a
lock that nobody will release. The fork server is a fresh process that imports torch once; its children start quickly
and share that memory. They end when their pipe does, so also when the training process dies.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

import torch

from pipeline.data.batch import Packed
from pipeline.data.dataset import DetectionDataset
from pipeline.data.groups import Request, make
from pipeline.data.slots import Pixels, SharedSlots
from pipeline.errors import PipelineError

PATIENCE = 5  # seconds for a process to end by itself


def prepare() -> None:
    """Start the fork server; it imports torch while this process builds its model."""
    _context()
    forkserver.ensure_running()


class GroupProcess:
    """One process, seen from the training process. A pipe holds some hundred KB, a request has 100 bytes per image."""

    def __init__(self, sources: Sequence[DetectionDataset], slots: SharedSlots) -> None:
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, sources, slots), daemon=True)
        self._process.start()
        theirs.close()  # else it would be open here when the process is gone, and `receive` would wait

    @property
    def pid(self) -> int:
        """Its id."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, slot: int, request: Request) -> None:
        """Ask for a group, to be written into `slot`. Raises RuntimeError if the process was killed."""
        try:
            self._pipe.send((slot, request))
        except OSError:
            raise self._gone() from None

    def receive(self) -> Packed | Exception:
        """The group that was asked for first, or what making it raised. Raises RuntimeError as `send` does."""
        try:
            made: Packed | Exception = self._pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        return made

    def close(self) -> None:
        """Let it end when it has finished what it is at."""
        self._pipe.close()

    def join(self) -> None:
        """After `close`: wait until it has ended."""
        self._process.join(PATIENCE)
        if self._process.is_alive():  # waits for storage
            self._process.kill()
            self._process.join()

    def _gone(self) -> RuntimeError:
        self._process.join(PATIENCE)
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return RuntimeError(
            f"a process of the loader {how}; if memory ran out, lower data.workers or train.micro_batch"
        )


def _work(pipe: Connection, sources: Sequence[DetectionDataset], slots: SharedSlots) -> None:
    """What a process does: groups, until the training process closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the training process says when to end
    torch.set_num_threads(1)
    try:
        while True:
            slot, request = pipe.recv()
            pipe.send(_made(request, sources, slots.pixels(slot, request.shape)))
    except (EOFError, OSError):
        return


def _made(request: Request, sources: Sequence[DetectionDataset], images: Pixels) -> Packed | Exception:
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
