"""Detection of a straggler: a rank that delays all others, and by how much.

All ranks end a step together, because they wait for each other when gradients are reduced. They differ in the time
that each spends alone: waiting for data and in forward passes. One small collective per log interval compares it. Under
ZeRO 3 the comparison is less exact, because forward passes fetch weights from all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from pipeline.logs import get_logger
from pipeline.runtime import Runtime

log = get_logger("stragglers")
WARN_INTERVALS = 5  # log intervals in a row before a warning
WARN_SHARE = 0.1  # smallest lag that counts, as a share of the step time


@dataclass(frozen=True)
class Straggler:
    """The slowest rank of an interval, and its lag: seconds per step above the median of the others."""

    rank: int
    lag: float


def gather_values(values: Sequence[float], runtime: Runtime) -> list[list[float]]:
    """The values of every rank, in order of rank (a collective)."""
    if runtime.world == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64, device=runtime.device)
    ranks = [torch.empty_like(own) for _ in range(runtime.world)]
    dist.all_gather(ranks, own)
    table: list[list[float]] = torch.stack(ranks).tolist()
    return table


def find_straggler(own_seconds: Sequence[float]) -> Straggler | None:
    """The straggler, given each rank's own seconds per step; None if there is only one rank."""
    if len(own_seconds) < 2:
        return None
    rank = max(range(len(own_seconds)), key=lambda each: own_seconds[each])
    others = [seconds for each, seconds in enumerate(own_seconds) if each != rank]
    return Straggler(rank, own_seconds[rank] - median(others))


class StragglerMonitor:
    """Warns once of each rank that lags by WARN_SHARE of the step time in WARN_INTERVALS intervals in a row."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self._in_a_row = 0
        self._reported: set[int] = set()

    def update(self, straggler: Straggler | None, step_seconds: float) -> None:
        """Count one interval, given its straggler and its seconds per step."""
        if straggler is None or straggler.lag < WARN_SHARE * step_seconds:
            self._rank = None
            return
        self._in_a_row = self._in_a_row + 1 if straggler.rank == self._rank else 1
        self._rank = straggler.rank
        if self._in_a_row < WARN_INTERVALS or straggler.rank in self._reported:
            return
        self._reported.add(straggler.rank)
        log.warning(
            "rank %d delays the other ranks: its data and forward passes take %.3g s longer per step than theirs, "
            "%.0f%% of the step; check its node",
            straggler.rank,
            straggler.lag,
            100 * straggler.lag / step_seconds,
        )
