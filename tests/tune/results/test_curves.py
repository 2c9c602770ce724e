"""Curves of a sweep: means over repeats, groups by variant, the best point first."""

import statistics
from dataclasses import replace

from support.sweeps import Play, make_space

from tune.results.curves import NAMED, find_curves
from tune.results.outcomes import outcomes_of, rank
from tune.settings import Domain
from tune.space import VARIANT, Axis

BUNDLES = {"a": {}, "b": {"model.refine": True}}


def test_curves_of_repeats_are_means_with_spread() -> None:
    space = make_space({"samples": 2, "repeats": 3})
    ledger = Play(space).finish()
    outcomes = outcomes_of(space, ledger)
    curves = find_curves(space, ledger, outcomes)
    assert [curve.name for curve in curves] == [outcome.name for outcome in rank(outcomes)]
    for curve in curves:
        for epoch, mean, spread in zip(curve.epochs, curve.means, curve.spreads, strict=True):
            scores = [row.score for row in ledger.reports if row.epoch == epoch and row.trial.startswith(curve.name)]
            assert len(scores) == 3
            assert (mean, spread) == (statistics.fmean(scores), statistics.stdev(scores))


def test_curves_of_variants_are_grouped_and_one_of_each_is_the_best() -> None:
    space = make_space({"samples": 9, "scheduler": "none"})
    space = replace(space, axes=(Axis((VARIANT,), Domain(choice=tuple(BUNDLES)), BUNDLES), *space.axes))
    ledger = Play(space).finish()
    curves = find_curves(space, ledger, outcomes_of(space, ledger))
    assert {curve.group for curve in curves} == {"a", "b"}
    assert sum(curve.best for curve in curves) == 2
    assert curves[0].best


def test_curves_of_many_points_name_the_best_and_mark_stopped_ones() -> None:
    space = make_space({"samples": 20, "scheduler": "asha", "concurrent": 4})
    ledger = Play(space).finish()
    curves = find_curves(space, ledger, outcomes_of(space, ledger))
    assert [bool(curve.group) for curve in curves] == [True] * NAMED + [False] * (20 - NAMED)
    assert {curve.name for curve in curves if curve.stopped} == {
        trial.name for trial in ledger.with_status("stopped early")
    }


def test_curves_know_where_the_learning_rate_dropped() -> None:
    space = make_space({"sampler": "grid"}, {"optim.drop_epochs": {"grid": ([2], [1, 3], [4])}})
    ledger = Play(space).finish()
    drops = {curve.name: list(curve.drops) for curve in find_curves(space, ledger, outcomes_of(space, ledger))}
    assert drops == {"sweep-000": [2], "sweep-001": [1, 3], "sweep-002": []}  # after the last epoch nothing changes
