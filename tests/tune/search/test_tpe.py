"""TPE: a function of the ledger, which it learns from."""

from dataclasses import replace

import pytest
from ray.tune.search.optuna import OptunaSearch
from support.sweeps import Play, make_space

from tune.search.ledger import Trial
from tune.search.sampling import point_score
from tune.search.tpe import STARTUP_POINTS, suggest

pytestmark = pytest.mark.filterwarnings("error")
AXES = {
    "optim.lr": {"loguniform": (1e-5, 1e-2)},
    "optim.warmup_steps": {"randint": (0, 100)},
    "optim.drop_epochs": {"choice": ([2], [3], [2, 3])},
}
SEARCH = {"sampler": "tpe", "scheduler": "none", "samples": 30}


def near_the_top(trial: Trial, epoch: int) -> float:
    """Best at the highest learning rate with drops after 2 and 3 epochs; the value grows with the epochs."""
    return epoch * (trial.values["optim.lr"] + 0.01 * (trial.values["optim.drop_epochs"] == [2, 3])) / 100


def test_suggest_moves_to_the_good_region() -> None:
    ledger = Play(make_space(SEARCH, AXES), near_the_top).finish()
    late = ledger.trials[STARTUP_POINTS + 5 :]
    assert sum(trial.values["optim.lr"] > 1e-3 for trial in late) > 0.7 * len(late)  # a third at random
    assert sum(trial.values["optim.drop_epochs"] == [2, 3] for trial in late) > 0.6 * len(late)


def test_suggest_depends_on_the_ledger_and_the_seed_alone() -> None:
    space = make_space(SEARCH, AXES)
    ledger = Play(space, near_the_top).finish()
    assert suggest(space, ledger, 30) == suggest(space, ledger, 30)
    other = replace(space, search=space.search.model_copy(update={"seed": 1}))
    assert suggest(space, ledger, 30) != suggest(other, ledger, 30)
    assert all(axis.domain.holds(suggest(space, ledger, 30)[axis.label]) for axis in space.axes)


def test_suggest_avoids_the_region_that_fails() -> None:
    play = Play(make_space({**SEARCH, "trial_failures": 0}, AXES), lambda trial, epoch: epoch / 100)
    while play.start():
        if play.sweep.ledger.trials[-1].values["optim.lr"] > 1e-3:  # as a learning rate that gives NaN
            play.fail(0)
        else:
            play.act([("train", 0)] * 4)
    late = play.sweep.ledger.trials[STARTUP_POINTS + 5 :]
    assert sum(trial.values["optim.lr"] > 1e-3 for trial in late) < 0.15 * len(late)


def test_suggest_beside_running_trials_is_new() -> None:
    play = Play(make_space({**SEARCH, "concurrent": 3, "points": [{"optim.lr": 1e-3}]}, AXES), near_the_top)
    while play.start():
        pass
    play.act([("train", 0)] * 60)
    while play.start():
        pass
    values = [tuple(map(str, trial.values.values())) for trial in play.sweep.ledger.trials]
    assert len({*values}) == len(values)


def test_suggest_learns_from_the_mean_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    space = make_space({**SEARCH, "samples": 3, "repeats": 2}, AXES)
    ledger = Play(space, near_the_top).finish()
    given: list[float | None] = []
    monkeypatch.setattr(OptunaSearch, "add_evaluated_point", lambda self, values, score, pruned: given.append(score))
    suggest(space, ledger, 3)
    assert given == [point_score(ledger, point) for point in range(3)]
    assert None not in given
