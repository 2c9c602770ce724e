"""The sampler `tpe`: Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) through Ray's OptunaSearch.

For each point a new study is filled from the ledger. So a resumed sweep has seen what the killed one had seen. Points
that are still running are in the study without a score, and Optuna counts them as bad (`constant_liar`), so that
trials of the same time are not alike. Points that failed count as worse than all others.
"""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from tune.search.ledger import Ledger
from tune.search.sampling import point_score
from tune.space import Axis, Space

STARTUP_POINTS = 10  # Optuna's default: so many are drawn at random first
SEEDS = 2**32


def suggest(space: Space, ledger: Ledger, point: int) -> dict[str, Any]:
    """The values of point number `point`, given all points in the ledger."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    running = [number for number in ledger.points if _is_open(ledger, number)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constant_liar is one
        sampler = optuna.samplers.TPESampler(
            seed=(space.search.seed * 1_000_003 + point) % SEEDS, n_startup_trials=STARTUP_POINTS, constant_liar=True
        )
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)  # Optuna prints a line for each new study
    try:
        search = OptunaSearch(
            space={axis.label: distribution(axis) for axis in space.axes},
            metric=space.search.metric,
            mode="max",
            points_to_evaluate=[encode(space, ledger.of_point(number)[0].values) for number in running],
            sampler=sampler,
        )
        for number in ledger.points:
            if number not in running:
                values, score = ledger.of_point(number)[0].values, point_score(ledger, number)
                search.add_evaluated_point(encode(space, values), score, pruned=score is None)
        for number in running:  # the given points come in their order, and stay without a score
            search.suggest(str(number))
        found = search.suggest(str(point))
    finally:
        optuna.logging.set_verbosity(level)
    assert found is not None
    return {axis.label: _decode(axis, found[axis.label]) for axis in space.axes}


def distribution(axis: Axis) -> Any:
    """The axis as Optuna's distribution; one of listed values is over their numbers, because values may be lists."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    domain = axis.domain
    if domain.values is not None:
        return CategoricalDistribution(range(len(domain.values)))
    low, high = domain.bounds
    if domain.randint is not None:
        return IntDistribution(int(low), int(high) - 1)
    return FloatDistribution(low, high, log=domain.loguniform is not None)


def encode(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """A point's values as those of `distribution`."""
    return {axis.label: _encode_value(axis, values[axis.label]) for axis in space.axes}


def _encode_value(axis: Axis, value: Any) -> Any:
    return value if axis.domain.values is None else axis.domain.values.index(value)


def _is_open(ledger: Ledger, point: int) -> bool:
    return any(trial.status in ("waiting", "running") for trial in ledger.of_point(point))


def _decode(axis: Axis, value: Any) -> Any:
    return value if axis.domain.values is None else axis.domain.values[value]
