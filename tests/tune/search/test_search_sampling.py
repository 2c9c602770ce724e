"""Samplers: values inside the space, equal for equal seeds, each combination where it is due."""

import pytest
from support.sweeps import Play, make_space

from tune.search.sampling import best_point, draw, next_values, point_score

MIXED = {
    "optim.lr": {"loguniform": (1e-4, 1e-3)},
    "optim.clip": {"uniform": (0.1, 0.2)},
    "optim.warmup_steps": {"randint": (3, 6)},
    "optim.drop_epochs": {"choice": ([2], [3])},
    "model.enc_points": {"grid": (2, 4)},
    "model.dec_points": {"grid": (1, 2, 4)},
}


def test_draw_is_inside_the_space() -> None:
    space = make_space({"sampler": "random", "scheduler": "none"}, MIXED)
    drawn = [draw(space, point) for point in range(200)]
    for axis in space.axes:
        assert all(axis.domain.holds(values[axis.label]) for values in drawn)
    assert {values["optim.warmup_steps"] for values in drawn} == {3, 4, 5}
    assert sum(values["optim.lr"] < 10**-3.5 for values in drawn) == pytest.approx(
        100, abs=30
    )  # half, in the logarithm


def test_draw_depends_on_seed_and_point_alone() -> None:
    first, again, other = (make_space({"seed": seed}, MIXED) for seed in (1, 1, 2))
    assert [draw(first, 3), draw(first, 0)] == [draw(again, 3), draw(again, 0)]
    assert draw(first, 3)["optim.lr"] != draw(other, 3)["optim.lr"] != draw(other, 4)["optim.lr"]


def test_each_draw_has_every_combination_of_the_grids() -> None:
    space = make_space({"samples": 2, "points": [{"optim.lr": 2e-4}]}, MIXED)
    assert space.points == 1 + 2 * 6
    ledger = Play(space).finish()
    pairs = [(trial.values["model.enc_points"], trial.values["model.dec_points"]) for trial in ledger.trials[1:]]
    assert sorted(pairs[:6]) == sorted(pairs[6:]) == [(a, b) for a in (2, 4) for b in (1, 2, 4)]
    assert next_values(space, ledger, 13) is None


def test_point_score_is_the_mean_once_all_repeats_have_ended() -> None:
    play = Play(make_space({"samples": 2, "repeats": 2, "concurrent": 2}))
    play.act([("start", 0), ("start", 0), *[("train", 0)] * 4])
    assert point_score(play.sweep.ledger, 0) is None
    ledger = play.finish()
    scores = [ledger.score(name) or 0.0 for name in ("sweep-000-0", "sweep-000-1")]
    assert scores[0] != scores[1]
    assert point_score(ledger, 0) == pytest.approx(sum(scores) / 2)
    means = [point_score(ledger, point) or 0.0 for point in (0, 1)]
    assert best_point(ledger) == means.index(max(means))


def test_best_point_without_scores_is_none() -> None:
    play = Play(make_space({"samples": 1, "trial_failures": 0}))
    play.act([("start", 0), ("train", 0), ("fail", 0)])  # its score is that of a trial that failed
    assert best_point(play.sweep.ledger) is None
