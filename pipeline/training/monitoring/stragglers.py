"""Which rank holds the others up, and by how much; for `observer.py`, every log interval.

All ranks of a step end it together, because they wait for each other when gradients are added. What differs is what a
rank does alone: waiting for its data and its forward passes. One small collective per log interval compares that. Under
ZeRO 3 forward passes fetch weights from all ranks and blur it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from pipeline.logs import get_logger
from pipeline.runtime import Runtime

log = get_logger("stragglers")
PATIENCE = 5  # log intervals in a row before a warning
SHARE = 0.1  # of the step time, from which on it is worth one


@dataclass(frozen=True)
class Straggler:
    """The slowest rank of an interval, and the seconds per step by which it lies above the median of the others."""

    rank: int
    lag: float


def gathered(values: Sequence[float], runtime: Runtime) -> list[list[float]]:
    """The numbers of every rank, by rank (a collective)."""
    if runtime.world == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64, device=runtime.device)
    ranks = [torch.empty_like(own) for _ in range(runtime.world)]
    dist.all_gather(ranks, own)
    table: list[list[float]] = torch.stack(ranks).tolist()
    return table


def slowest(own_seconds: Sequence[float]) -> Straggler | None:
    """The straggler among ranks that spent so many seconds per step alone; None if there is only one."""
    if len(own_seconds) < 2:
        return None
    rank = max(range(len(own_seconds)), key=lambda each: own_seconds[each])
    others = [seconds for each, seconds in enumerate(own_seconds) if each != rank]
    return Straggler(rank, own_seconds[rank] - median(others))


class StragglerWatch:
    """Warns once of each rank that was the slowest by a tenth of the step time, several intervals in a row."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self._in_a_row = 0
        self._told: set[int] = set()

    def see(self, straggler: Straggler | None, step_seconds: float) -> None:
        """Look at one interval with so many seconds per step."""
        if straggler is None or straggler.lag < SHARE * step_seconds:
            self._rank = None
            return
        self._in_a_row = self._in_a_row + 1 if straggler.rank == self._rank else 1
        self._rank = straggler.rank
        if self._in_a_row < PATIENCE or straggler.rank in self._told:
            return
        self._told.add(straggler.rank)
        log.warning(
            "rank %d holds the others up: its data and forward passes take %.3g s longer per step than theirs, %.0f%% "
            "of the step; look at its node",
            straggler.rank,
            straggler.lag,
            100 * straggler.lag / step_seconds,
        )
