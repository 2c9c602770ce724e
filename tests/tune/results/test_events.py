"""What happened to trials: the limits of early stopping are those that Ray stopped by, exchanges have both values."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweeps import Play, make_space

from tune.results.events import find_events, find_limits, values_before
from tune.search.ledger import Trial
from tune.search.sampling import draw

ACTIONS = st.lists(st.tuples(st.sampled_from(["start", "train", "kill", "kill in an epoch"]), st.integers(0, 3)))


def score(trial: Trial, epoch: int) -> float:
    """Curves that cross: early scores say little about later ones."""
    return ((trial.point * 37 + epoch * (trial.point % 5) * 13) % 101) / 100


@settings(max_examples=40)
@given(
    st.sampled_from(
        [{"scheduler": "asha", "reduction": 2}, {"scheduler": "asha", "grace": 2}, {"scheduler": "median"}]
    ),
    st.integers(1, 4),
    ACTIONS,
)
def test_limits_are_those_that_ray_stopped_by(search: dict[str, Any], concurrent: int, actions: list[Any]) -> None:
    play = Play(make_space({"samples": 8, "concurrent": concurrent, **search}), score)
    play.act(actions)
    ledger = play.finish()
    limits = find_limits(play.space, ledger)
    stopped = [trial.name for trial in ledger.with_status("stopped early")]
    assert sorted(limits) == sorted(stopped)
    for name, limit in limits.items():
        assert limit.score < limit.least
        assert limit.epoch == ledger.epochs(name)
    found = {each.trial: each for each in find_events(play.space, ledger) if each.what == "stopped early"}
    assert {name: (each.epoch, each.score, each.least) for name, each in found.items()} == {
        name: (limit.epoch, limit.score, limit.least) for name, limit in limits.items()
    }


def test_limit_of_asha_is_the_quantile_of_the_others() -> None:
    play = Play(
        make_space({"samples": 3, "concurrent": 1, "reduction": 2}), lambda trial, _: (0.4, 0.2, 0.29)[trial.point]
    )
    limits = find_limits(play.space, play.finish())
    assert (limits["sweep-001"].least, limits["sweep-001"].others) == (0.4, 1)
    assert limits["sweep-002"].least == pytest.approx(0.3)  # the median of 0.4 and 0.2


def test_events_of_failures_have_cause_and_attempts() -> None:
    play = Play(make_space({"samples": 2, "scheduler": "none", "concurrent": 1}))
    play.act([("start", 0), ("train", 0), ("fail", 0), ("start", 0), ("fail", 0), ("start", 0), ("fail", 0)])
    failed, again = find_events(play.space, play.finish())
    assert (failed.trial, failed.what, failed.epoch) == ("sweep-000", "failed", 1)
    assert "out of memory" in failed.why
    assert (again.trial, again.what) == ("sweep-001", "started again")


def test_events_of_an_unfinished_sweep_name_what_has_not_ended() -> None:
    play = Play(make_space({"samples": 3, "scheduler": "none"}))
    play.act([("start", 0), ("train", 0)])
    (event,) = find_events(play.space, play.sweep.ledger)
    assert (event.what, event.epoch) == ("has not ended", 1)


def test_events_of_pbt_have_the_values_before_and_after() -> None:
    space = make_space({"samples": 4, "scheduler": "pbt", "quantile": 0.5}, {"optim.lr": {"loguniform": (1e-5, 1e-2)}})
    ledger = Play(space).finish()
    assert ledger.exchanges
    last: dict[str, Any] = {trial.name: draw(space, trial.point) for trial in ledger.trials}
    for each in ledger.exchanges:
        assert values_before(space, ledger, each) == last[each.trial]
        last[each.trial] = each.values
    assert {trial.name: trial.values for trial in ledger.trials} == last
    events = [event for event in find_events(space, ledger) if event.what == "continued from another"]
    assert sorted((event.trial, event.epoch) for event in events) == sorted(
        (each.trial, each.epoch) for each in ledger.exchanges
    )
    for event in events:
        (its,) = [row.score for row in ledger.reports if (row.trial, row.epoch) == (event.trial, event.epoch)]
        assert event.score == its
