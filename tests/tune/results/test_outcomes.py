"""The outcomes of a sweep: the best one, its config, and repeats."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.sweeps import Play, make_space

from pipeline.config import dump, load_config
from pipeline.errors import SweepError
from tune.load import load_space
from tune.results.listing import list_outcomes
from tune.results.outcomes import Outcome, best, outcomes_of, rank, write_best
from tune.search.sampling import best_point
from tune.space import Space

AXES = {
    "optim.lr": {"loguniform": [1e-4, 1e-3]},
    "optim.drop_epochs": {"choice": [[1], [2]]},
    "model.enc_points, model.dec_points": {"grid": [2, 4]},
}


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "base.yaml").write_text("tracking: {register_as: detector}\n")
    path = tmp_path / "space.yaml"
    space = {"config": "base.yaml", "overrides": {"name": "sweep", "train.epochs": 3}, "space": AXES}
    path.write_text(yaml.safe_dump(space, sort_keys=False))
    return load_space(path)


def outcome(name: str, score: float | None, points: int = 2, **changes: Any) -> Outcome:
    values = {"optim.lr": 2e-4, "optim.drop_epochs": [2], "model.enc_points, model.dec_points": points}
    return Outcome(**{"name": name, "values": values, "status": "finished", "epochs": 3, "score": score, **changes})


def test_best_takes_the_highest_score_then_the_first() -> None:
    outcomes = [outcome("a", None), outcome("b", 0.1), outcome("c", 0.3), outcome("d", 0.3), outcome("e", 0.0)]
    assert best(outcomes).name == "c"
    assert best([outcome("zero", 0.0)]).name == "zero"


def test_best_and_rank_put_a_failed_outcome_behind_those_that_have_not() -> None:
    """As `best_point` does, which says whose checkpoints are kept."""
    failed = outcome("a", 0.5, status="failed", error="out of memory")
    outcomes = [outcome("b", None), failed, outcome("c", 0.0), outcome("d", 0.1, status="interrupted")]
    assert best(outcomes).name == "d"
    assert [each.name for each in rank(outcomes)] == ["d", "c", "a", "b"]
    with pytest.raises(SweepError, match="out of memory"):
        best([failed])


def test_best_of_a_sweep_whose_best_trial_failed_is_the_point_whose_checkpoints_are_kept() -> None:
    play = Play(make_space({"samples": 2, "trial_failures": 0, "scheduler": "none"}))
    play.score = lambda trial, epoch: 0.5 - trial.point / 10
    play.act([("start", 0), ("train", 0), ("fail", 0)])
    ledger = play.finish()
    assert ledger.trials[0].status == "failed"
    assert best(outcomes_of(play.space, ledger)).name == f"sweep-{best_point(ledger):03d}" == "sweep-001"


def test_best_without_scores_raises_with_reasons() -> None:
    with pytest.raises(SweepError, match="out of memory"):
        best([outcome("a", None, status="failed", error="out of memory"), outcome("b", None)])


def test_best_config_is_one_that_training_accepts(space: Space, tmp_path: Path) -> None:
    winner = outcome("sweep-7", 0.25, points=4)
    path = write_best(space, winner, str(tmp_path))
    config = load_config(path)
    assert dump(config) == dump(space.config(winner.values, "sweep-best", register=True))
    assert (config.model.enc_points, config.model.dec_points, config.optim.drop_epochs) == (4, 4, (2,))
    assert config.tracking.register_as == "detector"
    assert "sweep-7" in Path(path).read_text().splitlines()[0]


def test_outcomes_of_repeats_have_mean_and_spread() -> None:
    space = make_space({"samples": 2, "repeats": 3})
    ledger = Play(space).finish()
    found = outcomes_of(space, ledger)
    assert [each.name for each in found] == ["sweep-000", "sweep-001"]
    scores = [ledger.score(f"sweep-000-{repeat}") or 0.0 for repeat in range(3)]
    mean = sum(scores) / 3
    assert found[0].score == pytest.approx(mean)
    assert found[0].spread == pytest.approx((sum((score - mean) ** 2 for score in scores) / 2) ** 0.5)
    assert f"{mean:.4f} ± {found[0].spread:.4f}" in list_outcomes(space, found)


def test_outcomes_with_a_failed_repeat_have_no_score() -> None:
    play = Play(make_space({"samples": 1, "repeats": 2, "trial_failures": 0}))
    play.act([("start", 0), ("fail", 0)])
    play.finish()
    (found,) = outcomes_of(play.space, play.sweep.ledger)
    assert (found.status, found.score, found.spread, found.error) == ("failed", None, None, "out of memory")


def test_outcomes_of_unfinished_trials_are_interrupted() -> None:
    play = Play(make_space({"samples": 3, "concurrent": 1, "scheduler": "none"}))
    play.act([("start", 0), ("train", 0)])
    (found,) = outcomes_of(play.space, play.sweep.ledger)
    assert (found.status, found.epochs) == ("interrupted", 1)
    assert found.score is not None
