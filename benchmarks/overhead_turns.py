"""Turns for `benchmarks.overhead`: two training loops and Ray on the same cores, where all but one are stopped.

Other load of the machine then affects all alike. Separate runs, minutes apart, differ by more than the measured cost.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import psutil

from pipeline.errors import ConfigError
from pipeline.launch.ray_internals import WORKER_TITLE

PLAIN_RANK, OUR_RANK = "benchmarks.overhead_plain", WORKER_TITLE  # in command lines
RUNNING = {  # during whose turn
    "plain": {"plain"},
    "plain beside an idle Ray": {"plain", "ray"},
    "ours": {"ours", "ray"},
}


@dataclass(frozen=True)
class Turn:
    """Who had the cores when, in Unix seconds."""

    kind: str
    start: float
    end: float


@contextmanager
def turns(seconds: float, rank_cores: int) -> Iterator[list[Turn]]:
    """Give turns to the processes started inside, from the start of Ray Train's workers to their end.

    Args:
        seconds: of a turn.
        rank_cores: the ranks keep to so many cores and all else to the others; 0 leaves all on all.

    Yields:
        The turns that are over.

    Raises:
        ConfigError: no core is left to Ray, or `rank_cores` is negative.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 0 <= rank_cores < len(cores):
        raise ConfigError(
            f"--rank-cores {rank_cores}: give 0 to {len(cores) - 1}, so that one of {len(cores)} is Ray's"
        )
    over: list[Turn] = []
    ended = threading.Event()

    def give() -> None:
        for kind in cycle(RUNNING):
            found = by_role()
            if ended.is_set() or (over and not found["ours"]):
                break
            if not found["ours"]:
                ended.wait(1)
                continue
            _let(RUNNING[kind], found)
            for rank in [*found["plain"], *found["ours"]] if rank_cores else ():
                _keep_to(cores[:rank_cores], rank.pid)
            start = time.time()
            ended.wait(seconds)
            over.append(Turn(kind, start, time.time()))
        _let_all()

    giver = threading.Thread(target=give)
    if rank_cores:
        _keep_to(cores[rank_cores:], os.getpid())
    giver.start()
    try:
        yield over
    finally:
        ended.set()
        giver.join()
        _let_all()  # whatever ended the giver
        _keep_to(cores, os.getpid())


def by_role() -> dict[str, list[psutil.Process]]:
    """The processes below this one: ranks of the plain loop and of ours, and the rest, which is Ray's."""
    found: dict[str, list[psutil.Process]] = {"plain": [], "ours": [], "ray": []}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            command = " ".join(process.cmdline())
            role = "plain" if PLAIN_RANK in command else "ours" if command.startswith(OUR_RANK) else "ray"
            found[role].append(process)
    return found


def _let(running: set[str], found: dict[str, list[psutil.Process]]) -> None:
    """Continue the roles in `running`, stop the others."""
    for role, processes in found.items():
        for process in processes:
            with suppress(psutil.Error):
                process.resume() if role in running else process.suspend()


def _let_all() -> None:
    found = by_role()
    _let(set(found), found)


def _keep_to(cores: list[int], process: int) -> None:
    """Bind all threads of a process, and whatever it starts from now on."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)
