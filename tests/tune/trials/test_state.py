"""A sweep killed at any moment: no trial is lost or repeated, and the results are those of an undisturbed one."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweeps import EPOCHS, Play, make_space

from pipeline.errors import SweepError
from tune.search.ledger import ENDED, Report
from tune.search.sampling import grid_points

ACTIONS = ("start", "start", "train", "train", "train", "kill", "kill in an epoch", "fail")
actions = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5)), max_size=40)
GRID = {"optim.lr": {"grid": (1e-4, 3e-4)}, "model.enc_points": {"grid": (2, 4)}}


def check_play(play: Play) -> None:
    """What holds for every sweep that has ended."""
    ledger = play.sweep.ledger
    names = [trial.name for trial in ledger.trials]
    assert len({*names}) == len(names) == play.space.trials
    assert {trial.status for trial in ledger.trials} <= {*ENDED}
    for trial in ledger.trials:
        rows = play.trained[trial.name]
        assert [row.epoch for row in rows] == [*range(1, len(rows) + 1)]  # no epoch twice
        assert (trial.status == "finished") == (len(rows) == EPOCHS)
        reported = [report for report in ledger.reports if report.trial == trial.name]
        assert reported == rows[: len(reported)]  # a trial that was stopped may have trained on for a moment
        assert len(reported) == len(rows) or trial.status == "stopped early"


@settings(max_examples=40)
@given(
    actions=actions,
    search=st.sampled_from(
        [
            {"sampler": "random", "scheduler": "none"},
            {"sampler": "random", "scheduler": "none", "repeats": 2},
            {"sampler": "random", "scheduler": "asha", "reduction": 2},
            {"sampler": "random", "scheduler": "median"},
            {"sampler": "random", "scheduler": "pbt"},
        ]
    ),
    concurrent=st.integers(1, 3),
)
def test_sweep_killed_at_any_moment_loses_and_repeats_no_trial(
    actions: list[tuple[str, int]], search: dict[str, Any], concurrent: int
) -> None:
    play = Play(make_space({"samples": 5, "concurrent": concurrent, "trial_failures": 1000, **search}))
    for action in actions:
        ended = {trial.name for trial in play.sweep.ledger.trials if trial.status in ENDED}
        before = len(play.starts)
        play.act([action])
        assert not ended & {*play.starts[before:]}
        assert len(play.running) <= concurrent
    play.finish()
    check_play(play)


@settings(max_examples=40)
@given(
    actions=actions,
    case=st.sampled_from(
        [
            ("random", "none", 3),
            ("grid", "none", 3),
            ("random", "asha", 1),
            ("random", "median", 1),
            ("random", "pbt", 3),  # the population waits for its last trial
        ]
    ),
)
def test_sweep_killed_at_any_moment_ends_like_an_undisturbed_one(
    actions: list[tuple[str, int]], case: tuple[str, str, int]
) -> None:
    sampler, scheduler, concurrent = case
    search = {"sampler": sampler, "scheduler": scheduler, "concurrent": concurrent, "trial_failures": 1000}
    search |= {} if sampler == "grid" else {"samples": 6, "reduction": 2}
    space = make_space(search, GRID) if sampler == "grid" else make_space(search)
    undisturbed, killed = Play(space), Play(space)
    expected = undisturbed.finish()
    killed.act(actions)
    found = killed.finish()
    check_play(killed)
    assert expected.exchanges == found.exchanges
    assert {*killed.copies} == {*undisturbed.copies}
    assert bool(found.exchanges) == (scheduler == "pbt")
    for one, other in zip(expected.trials, found.trials, strict=True):
        assert (one.name, one.values, one.status) == (other.name, other.values, other.status)
        assert expected.score(one.name) == found.score(other.name)


@settings(max_examples=5)
@given(actions=actions)
def test_tpe_killed_at_any_moment_ends_like_an_undisturbed_one(actions: list[tuple[str, int]]) -> None:
    search = {"sampler": "tpe", "scheduler": "asha", "samples": 13, "concurrent": 1, "trial_failures": 1000}
    space = make_space(search)
    expected = Play(space).finish()
    killed = Play(space)
    killed.act(actions)
    found = killed.finish()
    assert [(trial.values, trial.status) for trial in found.trials] == [
        (trial.values, trial.status) for trial in expected.trials
    ]


def test_failed_trial_is_tried_again_and_the_others_continue() -> None:
    play = Play(make_space({"samples": 2, "scheduler": "none", "concurrent": 2, "trial_failures": 1}))
    play.act([("start", 0), ("start", 0), ("train", 0), ("fail", 0)])
    first = play.sweep.ledger.trials[0]
    assert (first.status, first.failures, first.error) == ("waiting", 1, "out of memory")
    play.act([("start", 0), ("fail", 1)])
    assert play.sweep.ledger.trials[0].status == "failed"
    assert play.starts == ["sweep-000", "sweep-001", "sweep-000"]
    assert [trial.status for trial in play.finish().trials] == ["failed", "finished"]


def test_final_failure_is_not_tried_again() -> None:
    play = Play(make_space({"samples": 1, "scheduler": "none", "trial_failures": 5}))
    play.start()
    play.sweep.fail("sweep-000", "data.train: a shard is damaged", final=True)
    assert play.sweep.ledger.trials[0].status == "failed"
    assert not play.start()
    assert play.sweep.finished


def test_report_twice_is_counted_once() -> None:
    play = Play(make_space({"samples": 1, "scheduler": "none"}))
    play.act([("start", 0), ("train", 0)])
    row = play.trained["sweep-000"][0]
    assert not play.sweep.report(row)
    assert play.sweep.ledger.reports == (row,)


def test_report_of_a_trial_that_was_stopped_is_left_out() -> None:
    play = Play(make_space({"samples": 1, "scheduler": "none"}))
    play.act([("start", 0), ("train", 0)])
    play.sweep.fail("sweep-000", "out of memory", final=True)
    assert not play.sweep.report(Report("sweep-000", 2, 20, 0.9))
    assert len(play.sweep.ledger.reports) == 1


def test_complete_sweep_has_nothing_left_to_do() -> None:
    play = Play(make_space({"samples": 1, "scheduler": "none"}))
    assert not play.sweep.is_complete
    play.finish()
    play.kill()
    assert play.sweep.is_complete


def test_checkpoint_that_cannot_be_handed_over_ends_the_sweep_until_it_is_resumed() -> None:
    play = Play(make_space({"scheduler": "pbt", "samples": 2, "quantile": 0.5, "concurrent": 2}))
    play.act([("start", 0), ("start", 0), ("train", 0), ("train", 0)])

    def refuse(donor: str, taker: str) -> None:
        raise OSError("no space")

    play.sweep._copy = refuse
    with pytest.raises(SweepError, match="no space"):
        play.start()
    assert not play.sweep.is_complete
    play.kill()
    assert play.start()
    assert len(play.copies) == len(play.read().exchanges) == 1


def test_ledger_that_cannot_be_written_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    play = Play(make_space({"samples": 1, "scheduler": "none"}))

    def refuse(ledger: object) -> None:
        raise OSError("no space")

    play.sweep._write = refuse
    assert play.start()
    assert "no space" in caplog.text


def test_minutes_count_over_all_starts() -> None:
    space = make_space({"minutes": 1.0, "scheduler": "none"})
    play = Play(space)
    now = [0.0]
    play.sweep._clock = lambda: now[0]
    assert play.start()
    now[0] = 59.0
    play.sweep.end("sweep-000")
    assert play.sweep.ledger.seconds == 59
    play.kill()
    assert play.start()  # 59 seconds so far
    play.sweep._clock = lambda: 2.0
    play.sweep.end("sweep-001")
    assert not play.start()
    assert play.sweep.finished


@pytest.mark.parametrize("concurrent", [1, 3])
@pytest.mark.parametrize("scheduler", ["none", "asha"])
def test_epochs_are_a_bound_on_all_trials_together(concurrent: int, scheduler: str) -> None:
    budget = 5 * EPOCHS + 1
    play = Play(make_space({"epochs": budget, "scheduler": scheduler, "concurrent": concurrent, "reduction": 2}))
    ledger = play.finish()
    trained = sum(len(rows) for rows in play.trained.values())
    assert budget - EPOCHS < trained <= budget
    assert len(ledger.trials) == 5 if scheduler == "none" else len(ledger.trials) > 5


@pytest.mark.parametrize("failing", [True, False])
def test_epochs_end_a_sweep_whose_trials_have_no_score(failing: bool) -> None:
    play = Play(make_space({"epochs": 3 * EPOCHS, "scheduler": "none"}))
    for _ in range(5):
        if not play.start():
            break
        name = play.starts[-1]
        if failing:
            play.sweep.fail(name, "out of memory", final=True)
        else:
            play.sweep.end(name)  # no object has the size that the metric counts
    assert play.starts == ["sweep-000", "sweep-001", "sweep-002"]
    assert play.sweep.finished


def test_given_points_come_first() -> None:
    points = ({"optim.lr": 2e-4}, {"optim.lr": 5e-4, "optim.drop_epochs": [3]})
    ledger = Play(make_space({"points": points, "samples": 1, "scheduler": "none"})).finish()
    assert [trial.values["optim.lr"] for trial in ledger.trials[:2]] == [2e-4, 5e-4]
    assert ledger.trials[1].values["optim.drop_epochs"] == [3]
    assert len(ledger.trials) == 3


def test_grid_runs_each_combination_once_with_given_points_first() -> None:
    space = make_space({"sampler": "grid", "points": [{"optim.lr": 3e-4, "model.enc_points": 4}]}, GRID)
    assert space.trials == 4
    assert grid_points(space)[0] == {"optim.lr": 3e-4, "model.enc_points": 4}
    assert [trial.values for trial in Play(space).finish().trials] == grid_points(space)
