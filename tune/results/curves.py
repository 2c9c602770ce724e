"""Convergence curves of a sweep: the score over the epochs of each point, with repeats their mean and spread.

Pure functions of the ledger; they never fail.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tune.results.listing import show_value
from tune.results.outcomes import Outcome, rank
from tune.search.ledger import Ledger
from tune.space import VARIANT, Space

NAMED = 6  # curves with their own colour


@dataclass(frozen=True)
class Curve:
    """One point."""

    name: str  # of the point
    group: str  # what it is coloured and named by; empty: in grey
    best: bool  # of its group
    epochs: Sequence[int]
    means: Sequence[float]  # over the repeats that were evaluated after this epoch
    spreads: Sequence[float]  # standard deviation; 0 of a single one
    stopped: bool  # early, or it failed
    drops: Sequence[int] = ()  # the epochs after which its learning rates dropped


def find_curves(space: Space, ledger: Ledger, outcomes: Sequence[Outcome]) -> list[Curve]:
    """The curves, best point first, without those that were never evaluated.

    With the axis `variant` the points of a variant are a group. Otherwise the best points are named, the others grey.
    """
    found: list[Curve] = []
    groups: set[str] = set()
    points = {outcome.name: point for outcome, point in zip(outcomes, ledger.points, strict=True)}
    for place, outcome in enumerate(rank(outcomes)):
        trials = {trial.name for trial in ledger.of_point(points[outcome.name])}
        scores: dict[int, list[float]] = {}
        for report in ledger.reports:
            if report.trial in trials:
                scores.setdefault(report.epoch, []).append(report.score)
        if not scores:
            continue
        if VARIANT in outcome.values:
            group = show_value(outcome.values[VARIANT])
        else:
            group = outcome.name if place < NAMED else ""
        epochs = sorted(scores)
        found.append(
            Curve(
                outcome.name,
                group,
                group not in groups,
                epochs,
                [statistics.fmean(scores[epoch]) for epoch in epochs],
                [statistics.stdev(scores[epoch]) if len(scores[epoch]) > 1 else 0.0 for epoch in epochs],
                outcome.status in ("stopped early", "failed"),
                [epoch for epoch in _drops(space, outcome) if epoch in scores and epoch < epochs[-1]],
            )
        )
        groups.add(group)
    return found


def _drops(space: Space, outcome: Outcome) -> Sequence[int]:
    optim = space.config(outcome.values, outcome.name).optim
    return optim.drop_epochs if optim.schedule == "step" and space.search.early_stop != "pbt" else ()
