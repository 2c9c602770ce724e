"""The plan before a sweep, the table after it, and its best config."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.sweeps import Play, make_space

from pipeline.config import dump, load_config
from pipeline.errors import SweepError
from tune import report
from tune.load import load_space
from tune.report import Outcome
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
    assert report.best(outcomes).name == "c"
    assert report.best([outcome("zero", 0.0)]).name == "zero"


def test_best_without_scores_raises_with_reasons() -> None:
    with pytest.raises(SweepError, match="out of memory"):
        report.best([outcome("a", None, status="failed", error="out of memory"), outcome("b", None)])


def test_best_config_is_one_that_training_accepts(space: Space, tmp_path: Path) -> None:
    winner = outcome("sweep-7", 0.25, points=4)
    path = report.write_best(space, winner, str(tmp_path))
    config = load_config(path)
    assert dump(config) == dump(space.config(winner.values, "sweep-best", register=True))
    assert (config.model.enc_points, config.model.dec_points, config.optim.drop_epochs) == (4, 4, (2,))
    assert config.tracking.register_as == "detector"
    assert "sweep-7" in Path(path).read_text().splitlines()[0]


def test_table_ranks_trials_and_keeps_errors(space: Space) -> None:
    failed = outcome("c", None, status="failed", epochs=0, error="no CUDA device")
    lines = report.table(space, [outcome("a", 0.1), failed, outcome("b", 0.2, points=4)]).splitlines()
    assert [line.split()[0] for line in lines] == ["trial", "b", "a", "c", "c:"]
    assert lines[1].split() == ["b", "0.0002", "[2]", "4", "3", "0.2000", "finished"]
    assert "no CUDA device" in lines[-1]


def test_outcomes_of_repeats_have_mean_and_spread() -> None:
    space = make_space({"samples": 2, "repeats": 3})
    ledger = Play(space).finish()
    found = report.outcomes_of(space, ledger)
    assert [each.name for each in found] == ["sweep-000", "sweep-001"]
    scores = [ledger.score(f"sweep-000-{repeat}") or 0.0 for repeat in range(3)]
    mean = sum(scores) / 3
    assert found[0].score == pytest.approx(mean)
    assert found[0].spread == pytest.approx((sum((score - mean) ** 2 for score in scores) / 2) ** 0.5)
    assert f"{mean:.4f} ± {found[0].spread:.4f}" in report.table(space, found)


def test_outcomes_with_a_failed_repeat_have_no_score() -> None:
    play = Play(make_space({"samples": 1, "repeats": 2, "trial_failures": 0}))
    play.act([("start", 0), ("fail", 0)])
    play.finish()
    (found,) = report.outcomes_of(play.space, play.sweep.ledger)
    assert (found.status, found.score, found.spread, found.error) == ("failed", None, None, "out of memory")


def test_outcomes_of_unfinished_trials_are_interrupted() -> None:
    play = Play(make_space({"samples": 3, "concurrent": 1, "scheduler": "none"}))
    play.act([("start", 0), ("train", 0)])
    (found,) = report.outcomes_of(play.space, play.sweep.ledger)
    assert (found.status, found.epochs) == ("interrupted", 1)
    assert found.score is not None


def test_plan_shows_config_trials_and_axes(space: Space) -> None:
    text = report.plan(space)
    assert "16 trials of up to 3 epochs by random on val/AP; asha: after 1 epochs 1 in 3 continues" in text
    assert yaml.safe_load(text.split("\n\n")[0])["name"] == "sweep"
    assert "loguniform  [0.0001, 0.001]" in text


@pytest.mark.parametrize(
    ("search", "text"),
    [
        ({"sampler": "tpe", "scheduler": "median"}, "8 trials of up to 4 epochs by tpe on val/AP; after 1 epochs"),
        ({"repeats": 3, "samples": 2}, "6 trials of up to 4 epochs by random on val/AP, 3 seeds each"),
        ({"epochs": 40, "minutes": 90, "scheduler": "none"}, "within 40 epochs of training, started within 90 minutes"),
    ],
)
def test_plan_shows_search(search: dict[str, Any], text: str) -> None:
    assert text in report.plan(make_space(search))
