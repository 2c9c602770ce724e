"""What happened to the trials of a sweep: which were stopped, failed or continued from another one, when and why.

Pure functions of the space and the ledger, independent of Ray. The limits of early stopping are computed again from the
evaluations in the order in which they arrived, as `search.stopping` had Ray compute them. They never fail.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tune.results.listing import show_value
from tune.results.outcomes import status_of
from tune.search.ledger import Exchange, Ledger, Trial
from tune.search.sampling import draw
from tune.space import Axis, Space

MEDIAN_TRIALS = 3  # so many others Ray's median rule needs


@dataclass(frozen=True)
class Limit:
    """What a trial was compared with."""

    epoch: int
    score: float  # of the trial
    least: float  # that it needed to continue
    others: int  # trials that the limit is computed from


@dataclass(frozen=True)
class Event:
    """One thing that happened to a trial."""

    trial: str
    what: str
    epoch: int  # after which it happened; 0 before the first evaluation
    score: float | None  # of the trial, with which it was compared
    least: float | None  # that it needed
    why: str


def find_events(space: Space, ledger: Ledger) -> list[Event]:
    """The events by trial; those of one trial in their order."""
    limits = find_limits(space, ledger)
    found = []
    for trial in ledger.trials:
        found += [_describe_exchange(space, ledger, each) for each in ledger.exchanges if each.trial == trial.name]
        epoch, error = ledger.epochs(trial.name), trial.error or "no reason was noted"
        if trial.status == "failed":
            again = f", at the last of {trial.failures} attempts" if trial.failures > 1 else ""
            found.append(Event(trial.name, "failed", epoch, None, None, f"{error}{again}"))
        elif trial.failures:
            times = "once" if trial.failures == 1 else f"{trial.failures} times"
            found.append(Event(trial.name, "started again", epoch, None, None, f"{times}, last because: {error}"))
        if trial.status == "stopped early":
            found.append(_describe_stop(space, ledger, trial, limits))
        if status_of(trial) == "interrupted":
            found.append(Event(trial.name, "has not ended", epoch, None, None, WAITING[trial.status]))
    return found


WAITING: Mapping[str, str] = {
    "waiting": "it waits to be started or continued",
    "running": "it was running when the ledger was last written",
    "paused": "it waits for the others of its population",
}


def find_limits(space: Space, ledger: Ledger) -> dict[str, Limit]:
    """Of each trial that asha or the median rule stopped, what it was compared with."""
    rule: _Asha | _Median
    if space.search.early_stop == "asha":
        rule = _Asha(space.rungs, space.search.reduction)
    elif space.search.early_stop == "median":
        rule = _Median(space.search.grace)
    else:
        return {}
    found: dict[str, Limit] = {}
    for report in ledger.reports:
        if report.trial in found:
            continue
        limit = rule.compare(report.trial, report.epoch, report.score)
        if limit and limit.score < limit.least and report.epoch < space.base.train.epochs:
            found[report.trial] = limit
    return found


@dataclass
class _Asha:
    """Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934), as Ray computes it."""

    rungs: tuple[int, ...]
    reduction: int
    recorded: dict[int, dict[str, float]] = field(default_factory=dict)

    def compare(self, trial: str, epoch: int, score: float) -> Limit | None:
        import numpy as np

        rung = next((rung for rung in reversed(self.rungs) if rung <= epoch), None)
        if rung is None or trial in self.recorded.get(rung, {}):
            return None
        others = self.recorded.setdefault(rung, {})
        least = float(np.percentile(list(others.values()), 100 * (1 - 1 / self.reduction))) if others else None
        limit = None if least is None else Limit(epoch, score, least, len(others))
        others[trial] = score
        return limit


@dataclass
class _Median:
    """The median rule of Google Vizier (Golovin et al. 2017), as Ray computes it."""

    grace: int
    scores: dict[str, dict[int, float]] = field(default_factory=dict)  # trial -> epoch -> score

    def compare(self, trial: str, epoch: int, score: float) -> Limit | None:
        own = self.scores.setdefault(trial, {})
        own[epoch] = score
        if epoch < self.grace:
            return None
        means = [
            statistics.fmean(inside)
            for name, rows in self.scores.items()
            if name != trial and max(rows) >= epoch
            if (inside := [each for at, each in rows.items() if self.grace <= at <= epoch])
        ]
        if len(means) < MEDIAN_TRIALS:
            return None
        return Limit(epoch, max(own.values()), statistics.median(means), len(means))


def values_before(space: Space, ledger: Ledger, exchange: Exchange) -> Mapping[str, Any]:
    """The values that a trial had before an exchange of pbt."""
    earlier = [each for each in ledger.exchanges if each.trial == exchange.trial and each.epoch < exchange.epoch]
    if earlier:
        return earlier[-1].values
    point = ledger.trial(exchange.trial).point
    given = space.search.points[point] if point < len(space.search.points) else {}
    return draw(space, point) | given


def _describe_stop(space: Space, ledger: Ledger, trial: Trial, limits: Mapping[str, Limit]) -> Event:
    limit = limits.get(trial.name)
    if limit is None:
        return Event(
            trial.name, "stopped early", ledger.epochs(trial.name), None, None, f"by {space.search.early_stop}"
        )
    if space.search.early_stop == "asha":
        others = "1 other" if limit.others == 1 else f"{limit.others} others"
        why = f"asha lets 1 of {space.search.reduction} continue; {others} had reached this epoch"
    else:
        why = f"its best score was below the median of the mean scores of {limit.others} others"
    return Event(trial.name, "stopped early", limit.epoch, limit.score, limit.least, why)


def _describe_exchange(space: Space, ledger: Ledger, exchange: Exchange) -> Event:
    scores = {each.trial: each.score for each in ledger.reports if each.epoch == exchange.epoch}
    before = values_before(space, ledger, exchange)
    changed = "; ".join(_describe_change(axis, before, exchange.values) for axis in space.axes)
    own, its = scores.get(exchange.trial), scores.get(exchange.donor)
    donor = exchange.donor if its is None else f"{exchange.donor}, which had {its:.4f}"
    why = f"among the worst {space.search.quantile:.0%}; it continued from the checkpoint of {donor}; {changed}"
    return Event(exchange.trial, "continued from another", exchange.epoch, own, None, why)


def _describe_change(axis: Axis, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    return f"{axis.label} {show_value(before[axis.label])} to {show_value(after[axis.label])}"
