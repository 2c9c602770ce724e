"""Replays a sampler on a table of trials that were really run: no training, so that many seeds cost seconds.

The sampler proposes values as in a sweep, and gets the recorded trial that is nearest and not taken yet, with that
trial's values and AP. Random search is replayed in the same way, so that both have the same distance to the table.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tune.search.ledger import Report, add_point, add_report, end_trial, new_ledger
from tune.search.sampling import next_values
from tune.search.tpe import STARTUP_POINTS
from tune.space import Axis, Space

SAMPLERS: tuple[Literal["random", "tpe"], ...] = ("random", "tpe")


@dataclass(frozen=True)
class RecordedTrial:
    """A trial of the table."""

    values: Mapping[str, Any]  # axis label -> value
    score: float


def replay(space: Space, table: Sequence[RecordedTrial], sampler: Literal["random", "tpe"], seed: int) -> list[float]:
    """The score of each trial of one search.

    Args:
        space: `search.samples` says how many trials; at most as many as the table has.
        table: recorded trials.
        sampler: of the search.
        seed: of the search.
    """
    search = space.search.model_copy(update={"sampler": sampler, "seed": seed})
    space = Space(space.base, search, space.axes)
    ledger, left, scores = new_ledger(space, {}), list(range(len(table))), []
    for point in range(min(space.points or 0, len(table))):
        proposed = next_values(space, ledger, point)
        assert proposed is not None  # the space has so many points
        nearest = min(left, key=lambda number: (distance(space, proposed, table[number].values), number))
        left.remove(nearest)
        ledger = add_point(ledger, "replay", point, table[nearest].values, repeats=1)
        name = ledger.trials[-1].name
        ledger = end_trial(add_report(ledger, Report(name, 1, 1, table[nearest].score)), name, "finished")
        scores.append(table[nearest].score)
    return scores


def distance(space: Space, a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Euclidean over the axes, each from 0 to 1.

    Ranges count by their width, in the logarithm where they are drawn so; listed values, which ascend, by their places.
    """
    return math.hypot(*(_apart(axis, a[axis.label], b[axis.label]) for axis in space.axes))


def _apart(axis: Axis, a: Any, b: Any) -> float:
    values = axis.domain.values
    if values is not None:
        return abs(values.index(a) - values.index(b)) / (len(values) - 1)
    low, high = axis.domain.bounds
    if axis.domain.loguniform is not None:
        low, high, a, b = (math.log(each) for each in (low, high, a, b))
    return abs(a - b) / (high - low)


@dataclass(frozen=True)
class Comparison:
    """Both samplers over seeds; what is by sampler has its name as the key."""

    mean: Mapping[str, list[float]]  # of the best score so far
    spread: Mapping[str, list[float]]  # its sample standard deviation
    guided: Mapping[str, float]  # mean score of the trials after those that TPE draws at random too
    wins: int  # seeds in which tpe ends above random
    losses: int  # and below


def compare(space: Space, table: Sequence[RecordedTrial], seeds: Sequence[int]) -> Comparison:
    """Replay both samplers with each seed."""
    runs = {name: [replay(space, table, name, seed) for seed in seeds] for name in SAMPLERS}
    columns = {
        name: list(zip(*(itertools.accumulate(scores, max) for scores in of_sampler), strict=True))
        for name, of_sampler in runs.items()
    }
    ends = [(max(tpe), max(random)) for tpe, random in zip(runs["tpe"], runs["random"], strict=True)]
    return Comparison(
        {name: [statistics.mean(column) for column in found] for name, found in columns.items()},
        {name: [statistics.stdev(column) for column in found] for name, found in columns.items()},
        {
            name: statistics.mean(score for scores in of_sampler for score in scores[STARTUP_POINTS:])
            for name, of_sampler in runs.items()
        },
        sum(tpe > random for tpe, random in ends),
        sum(tpe < random for tpe, random in ends),
    )
