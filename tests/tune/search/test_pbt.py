"""Population based training: who takes whose checkpoint, with which values, and when."""

from support.sweeps import EPOCHS, Play, make_space

from tune.results.outcomes import best, outcomes_of
from tune.search.ledger import Ledger
from tune.search.pbt import boundaries, takers, target_epochs

SEARCH = {"scheduler": "pbt", "samples": 8, "concurrent": 2, "quantile": 0.25}
AXES = {
    "optim.lr": {"loguniform": (1e-4, 1e-3)},
    "optim.warmup_steps": {"randint": (3, 60)},
    "optim.drop_epochs": {"choice": ([2], [3], [2, 3])},
}


def score(ledger: Ledger, trial: str, epoch: int) -> float:
    return next(each.score for each in ledger.reports if (each.trial, each.epoch) == (trial, epoch))


def test_boundaries_are_inside_the_run() -> None:
    assert boundaries(make_space(SEARCH)) == (1, 2, 3)
    assert boundaries(make_space({**SEARCH, "grace": 2}, epochs=5)) == (2, 4)
    assert boundaries(make_space({"scheduler": "asha"})) == ()
    plain = make_space({"scheduler": "none"})
    assert target_epochs(plain, Play(plain).sweep.ledger) == EPOCHS


def test_worst_trials_continue_from_the_best_ones() -> None:
    play = Play(make_space(SEARCH, AXES))
    ledger = play.finish()
    assert {trial.status for trial in ledger.trials} == {"finished"}
    assert not takers(ledger)
    assert {each.epoch for each in ledger.exchanges} == {1, 2, 3}
    assert play.copies == [(each.donor, each.trial) for each in ledger.exchanges]
    for epoch in (1, 2, 3):
        ranked = sorted((score(ledger, trial.name, epoch), trial.name) for trial in ledger.trials)
        made = [each for each in ledger.exchanges if each.epoch == epoch]
        assert {each.trial for each in made} == {name for _, name in ranked[:2]}
        assert {each.donor for each in made} <= {name for _, name in ranked[-2:]}


def test_changed_values_stay_inside_the_space() -> None:
    space = make_space({**SEARCH, "quantile": 0.5}, AXES)
    ledger = Play(space).finish()
    assert len(ledger.exchanges) == 12
    for each in ledger.exchanges:
        assert all(axis.domain.holds(each.values[axis.label]) for axis in space.axes)
        assert each.values != next(trial.values for trial in ledger.trials if trial.name == each.donor)
    last = {each.trial: each.values for each in ledger.exchanges}
    assert all(trial.values == last.get(trial.name, trial.values) for trial in ledger.trials)


def test_exchanges_do_not_depend_on_how_many_trials_run_at_a_time() -> None:
    one, many = (Play(make_space({**SEARCH, "concurrent": count}, AXES)).finish() for count in (1, 8))
    assert one.exchanges == many.exchanges
    other = Play(make_space({**SEARCH, "seed": 1}, AXES)).finish()
    assert [each.values for each in other.exchanges] != [each.values for each in one.exchanges]


def test_score_counts_from_the_last_exchange_on() -> None:
    """The best one of epoch 1 is the worst one of epoch 2, where it takes another one's weights."""
    scores = {"sweep-000": [0.9, 0.1, 0.3, 0.3], "sweep-001": [0.2, 0.4, 0.5, 0.5]}
    space = make_space({**SEARCH, "samples": 2, "quantile": 0.5, "grace": 2}, AXES)
    play = Play(space, lambda trial, epoch: scores[trial.name][epoch - 1])
    ledger = play.finish()
    assert [(each.trial, each.epoch) for each in ledger.exchanges] == [("sweep-000", 2)]
    assert (ledger.score("sweep-000"), ledger.score("sweep-001")) == (0.3, 0.5)
    assert best(outcomes_of(space, ledger)).name == "sweep-001"
    assert ledger.epochs("sweep-000") == EPOCHS


def test_failed_trial_leaves_the_population() -> None:
    play = Play(make_space({**SEARCH, "trial_failures": 0}, AXES))
    play.act([("start", 0), ("fail", 0)])
    ledger = play.finish()
    assert [trial.status for trial in ledger.trials] == ["failed", *["finished"] * 7]
    assert all("sweep-000" not in (each.trial, each.donor) for each in ledger.exchanges)
