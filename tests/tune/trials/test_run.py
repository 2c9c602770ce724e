"""A sweep's start and end without a cluster: checks, names, concurrent trials, a trial's config, Ctrl-C."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError
from support.sweeps import Play, make_space

from jobs.cli import main
from pipeline.config import ScalingConfig
from pipeline.errors import ConfigError, NonFiniteError, ResourceError
from tune.load import load_space
from tune.results.outcomes import best, outcomes_of
from tune.search.ledger import FILE, new_ledger
from tune.search.sampling import best_point
from tune.space import Space
from tune.sweep import build_parser, run
from tune.trials import run as trials
from tune.trials import whole
from tune.trials.adapters import LedgerSearch, describe, read_error
from tune.trials.check import CheckedSweep


@pytest.mark.parametrize(
    ("nodes", "scaling", "expected"),
    [
        ([{"CPU": 2}], {"num_workers": 1}, 2),
        ([{"CPU": 2}], {"num_workers": 2}, 1),
        ([{"CPU": 3}, {"CPU": 3}], {"num_workers": 1, "cpus_per_worker": 2}, 2),
        ([{"CPU": 3}, {"CPU": 3}], {"num_workers": 2, "cpus_per_worker": 2}, 1),
        ([{"CPU": 1}], {"num_workers": 2, "cpus_per_worker": 0.5}, 1),
        ([{}, {"CPU": 64, "GPU": 8}, {"CPU": 4, "GPU": 8}], {"num_workers": 4, "use_gpu": True}, 3),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 4}], {"num_workers": 2, "cpus_per_worker": 4, "use_gpu": True}, 1),
    ],
)
def test_concurrent_trials_counts_slots_per_node(nodes: list, scaling: dict, expected: int) -> None:
    scaling = {"use_gpu": False, **scaling}
    assert trials.concurrent_trials(nodes, ScalingConfig(**scaling)) == expected


def test_concurrent_trials_too_large_trial_raises() -> None:
    # 4 CPUs in all, but no node has the 3 that one worker needs
    with pytest.raises(ResourceError, match=r"num_workers=1 of 3 CPUs\b.*\b0\b"):
        trials.concurrent_trials([{"CPU": 2}, {"CPU": 2}], ScalingConfig(cpus_per_worker=3, use_gpu=False))


@pytest.mark.parametrize(
    ("wanted", "workers", "expected"), [(None, 1, 4), (9, 1, 4), (2, 1, 2), (None, 3, 1), (3, 2, 2)]
)
def test_prepare_starts_no_more_trials_than_fit(
    monkeypatch: pytest.MonkeyPatch, wanted: int | None, workers: int, expected: int
) -> None:
    """More would hold their drivers and wait for workers until they fail."""
    for name in ("start_ray", "check_resources"):
        monkeypatch.setattr(trials.cluster, name, lambda *_: None)
    monkeypatch.setattr(trials.cluster, "resolve_gpu", lambda scaling: scaling.model_copy(update={"use_gpu": False}))
    monkeypatch.setattr(trials, "build", lambda _: None)
    monkeypatch.setattr(trials.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}] * 2)
    space = make_space({"concurrent": wanted})
    scaling = space.base.scaling.model_copy(update={"num_workers": workers})
    space = Space(space.base.model_copy(update={"scaling": scaling}), space.search, space.axes)
    checked = CheckedSweep(space, new_ledger(space, {}))
    assert trials.prepare(checked).space.search.concurrent == expected


def test_trial_evaluates_inline_and_continues_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reports carry the AP that the search judges by."""
    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", object)
    given: list[Any] = []
    space = make_space({"repeats": 2})
    values = {"optim.lr": 2e-4, "optim.drop_epochs": [2]}
    chosen = {"trial": "sweep-007-1", "repeat": 1, "values": values}
    trials.trial(chosen, space, None, lambda config, **others: given.append((config, others["resume"])))
    ((config, resume),) = given
    assert (config.name, config.evaluation.where, config.optim.lr, resume) == ("sweep-007-1", "inline", 2e-4, "auto")
    assert config.seed == space.base.seed + 1
    assert space.base.evaluation.where == "auto"  # and so is what the winner's file says


def test_search_gives_tune_the_next_trial_then_waits_then_ends() -> None:
    play = Play(make_space({"samples": 1, "scheduler": "none"}))
    search = LedgerSearch(play.sweep)
    first = search.suggest("a")
    assert isinstance(first, dict)
    assert (first["trial"], first["repeat"], first["values"].keys()) == (
        "sweep-000",
        0,
        {"optim.lr", "optim.drop_epochs"},
    )
    assert search.suggest("b") is None
    play.sweep.end("sweep-000")
    assert search.suggest("c") == LedgerSearch.FINISHED


@pytest.mark.parametrize(
    ("error", "cause", "final"),
    [
        (RayTaskError("trial", "Traceback\nlast line", NonFiniteError("the loss is NaN")), "the loss is NaN", False),
        (RayTaskError("trial", "", ConfigError("data.train is wrong")), "data.train is wrong", True),
        (RayActorError(), "the process of the trial's driver died", False),
        (None, "no reason was given", False),
    ],
)
def test_describe_names_the_cause(error: BaseException | None, cause: str, final: bool) -> None:
    found = describe(error)
    assert found[0].startswith(cause)
    assert found[1] == final


def test_read_error_is_found_before_tune_has_copied_it(tmp_path: Path) -> None:
    path = tmp_path / "error.pkl"
    assert read_error(SimpleNamespace(pickled_error_file=None)) is None
    assert read_error(SimpleNamespace(pickled_error_file=str(path))) is None
    path.write_bytes(cloudpickle.dumps(NonFiniteError("the loss is NaN")))
    assert describe(read_error(SimpleNamespace(pickled_error_file=str(path)))) == ("the loss is NaN", False)


def test_dry_run_starts_nothing(space_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_parser(), run, [str(space_file), "--dry-run", "search.samples=2"]) == 0
    assert "2 trials" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("played", "code", "best"),
    [
        ("finished", 0, True),
        ("failed", 1, False),
        ("interrupted", 130, True),
        ("interrupted before an evaluation", 130, False),
    ],
)
def test_sweep_writes_best_config_and_exit_code(
    space_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    played: str,
    code: int,
    best: bool,
) -> None:
    loaded = load_space(space_file, ["search.samples=2", "search.trial_failures=0"])
    base = loaded.base.model_copy(update={"storage": str(tmp_path / "sweep")})
    space = Space(base, loaded.search, loaded.axes)
    play = Play(space)
    if played == "finished":
        play.act([("start", 0), ("fail", 0)])
        play.finish()
    elif played == "failed":
        play.act([("start", 0), ("fail", 0)] * 2)
    else:
        play.act([("start", 0), *[("train", 0)] * (played == "interrupted")])
    checked = CheckedSweep(space, play.read())
    monkeypatch.setattr(whole, "prepare", lambda checked: checked)
    monkeypatch.setattr("tune.trials.check.check_sweep", lambda space, resume: checked)
    monkeypatch.setattr(whole, "run_trials", lambda space, ledger, run_id, write: play.sweep.ledger)
    monkeypatch.setattr("pipeline.files.folder_lock.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(whole, "start_run", lambda *args, **kwargs: None)  # as if MLflow did not answer
    assert main(build_parser(), run, [str(space_file)]) == code
    assert ("--resume" in capsys.readouterr().err) == (code == 130)
    assert (tmp_path / "sweep/best.yaml").exists() == best
    assert (tmp_path / "sweep" / FILE).exists()


def test_best_point_of_the_ledger_is_the_tables_winner() -> None:
    play = Play(make_space({"samples": 6, "reduction": 2}))
    ledger = play.finish()
    assert best(outcomes_of(play.space, ledger)).name == f"sweep-{best_point(ledger):03d}"
