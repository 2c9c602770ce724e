"""Samplers: the values of the next point, as a function of the space, the point's number and the ledger.

A point has its own random numbers, from the seed and its number. So a resumed sweep draws what an undisturbed one would
have drawn, and nothing but the ledger has to be kept.
"""

import itertools
import math
from typing import Any

from tune.search.ledger import Ledger
from tune.settings import Domain
from tune.space import Space


def next_values(space: Space, ledger: Ledger, point: int) -> dict[str, Any] | None:
    """The values of point number `point` by axis label; None if the sampler has no more points.

    Args:
        space: the checked space.
        ledger: with the points before this one.
        point: counts from 0; the points in `search.points` come first.
    """
    if space.points is not None and point >= space.points:
        return None
    if space.search.sampler == "grid":
        return grid_points(space)[point]
    given = space.search.points[point] if point < len(space.search.points) else {}
    if space.search.sampler == "tpe" and not given:
        from tune.search.tpe import suggest  # loads Ray and Optuna

        return suggest(space, ledger, point)
    return draw(space, point) | given


def grid_points(space: Space) -> list[dict[str, Any]]:
    """All combinations, the last axis changing fastest; the given points come first and are not repeated."""
    labels = [axis.label for axis in space.axes]
    given = [{label: point[label] for label in labels} for point in space.search.points]
    first: list[dict[str, Any]] = []
    for values in itertools.chain(given, _combinations(space)):
        if values not in first:
            first.append(values)
    return first


def draw(space: Space, point: int) -> dict[str, Any]:
    """Random values; axes with `grid` have their values in turn, so that each draw has every combination of them."""
    import numpy as np

    random = np.random.default_rng([space.search.seed, point])
    turns = _combinations(space)
    turn = turns[max(0, point - len(space.search.points)) % len(turns)]
    return {
        axis.label: turn.get(axis.label) if axis.domain.grid else draw_value(axis.domain, random) for axis in space.axes
    }


def _combinations(space: Space) -> list[dict[str, Any]]:
    """Every combination of the values of the crossed axes."""
    crossed = {axis.label: values for axis, values in zip(space.axes, space.crossed, strict=True) if values}
    return [dict(zip(crossed, row, strict=True)) for row in itertools.product(*crossed.values())]


def draw_value(domain: Domain, random: Any) -> Any:
    """A random value; `grid` is like `choice`.

    Args:
        domain: of the values.
        random: NumPy's generator.
    """
    if domain.values is not None:
        return domain.values[int(random.integers(len(domain.values)))]
    low, high = domain.bounds
    if domain.randint is not None:
        return int(random.integers(low, high))
    if domain.loguniform is not None:
        return min(max(math.exp(random.uniform(math.log(low), math.log(high))), low), high)
    return float(random.uniform(low, high))


def point_score(ledger: Ledger, point: int) -> float | None:
    """The mean score of a point's repeats; None if one of them has not ended or has no score."""
    scores = [
        ledger.score(trial.name) for trial in ledger.of_point(point) if trial.status in ("finished", "stopped early")
    ]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(ledger.of_point(point)) else None


def best_point(ledger: Ledger) -> int | None:
    """The number of the point with the highest score, the earlier one of two equals; None without a score."""
    scores = {point: score for point in ledger.points if (score := point_score(ledger, point)) is not None}
    return max(scores, key=lambda point: scores[point], default=None)
