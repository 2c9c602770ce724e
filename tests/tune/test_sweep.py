"""The sweep's decisions without a cluster: concurrent trials, samples, early stops, reports."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from jobs.cli import main
from pipeline.config import ScalingConfig, dump, load_config
from pipeline.errors import ResourceError, RunError, ShardError, SweepError
from tune import report, trials
from tune.load import load_space
from tune.report import Outcome
from tune.space import Space
from tune.sweep import build_parser, run

AXES = {
    "optim.lr": {"loguniform": [1e-4, 1e-3]},
    "optim.drop_epochs": {"choice": [[1], [2]]},
    "model.enc_points, model.dec_points": {"grid": [2, 4]},
}


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("tracking: {register_as: detector}\n")
    path = tmp_path / "space.yaml"
    space = {"config": "base.yaml", "overrides": {"name": "sweep", "train.epochs": 3}, "space": AXES}
    path.write_text(yaml.safe_dump(space, sort_keys=False))
    return path


@pytest.fixture
def space(space_file: Path) -> Space:
    return load_space(space_file)


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


def test_plan_shows_config_trials_and_axes(space: Space) -> None:
    text = report.plan(space)
    assert "16 trials of up to 3 epochs by asha on val/AP; after 1 epochs 1 in 3 continues" in text
    assert load_yaml_head(text)["name"] == "sweep"
    assert "loguniform  [0.0001, 0.001]" in text


def load_yaml_head(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("\n\n")[0])


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


def test_domain_samples_inside_its_bounds(space: Space) -> None:
    lr, drop, points = (trials.domain(axis) for axis in space.axes)
    assert all(1e-4 <= lr.sample() <= 1e-3 for _ in range(20))
    assert all(drop.sample() in ([1], [2]) for _ in range(20))
    assert points == ray_tune.grid_search([2, 4])


def test_scheduler_asha_stops_weak_trials_before_the_last_epoch(space: Space) -> None:
    asha = trials.scheduler(space)
    assert isinstance(asha, ASHAScheduler)
    (bracket,) = asha._brackets
    assert tuple(sorted(milestone for milestone, _ in bracket._rungs)) == space.rungs == (1,)
    fifo = Space(space.base, space.search.model_copy(update={"method": "random"}), space.axes)
    assert isinstance(trials.scheduler(fifo), FIFOScheduler)


@pytest.mark.parametrize("method", ["asha"])
@pytest.mark.parametrize(
    ("epochs", "grace", "reduction"), [(2, 1, 2), (4, 1, 2), (9, 1, 3), (10, 1, 3), (12, 3, 2), (50, 4, 3)]
)
def test_rungs_equal_rays_own(space: Space, method: str, epochs: int, grace: int, reduction: int) -> None:
    base = space.base.model_copy(update={"train": space.base.train.model_copy(update={"epochs": epochs})})
    search = space.search.model_copy(update={"method": method, "grace": grace, "reduction": reduction})
    changed = Space(base, search, space.axes)
    (bracket,) = trials.scheduler(changed)._brackets
    assert tuple(sorted(milestone for milestone, _ in bracket._rungs)) == changed.rungs
    assert changed.rungs[-1] < epochs


def test_trial_evaluates_inline(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reports carry the AP that Tune judges by."""
    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", object)
    monkeypatch.setattr(ray_tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "7"))
    given: list[Any] = []
    values = {axis.label: 2 if "points" in axis.label else [1] if "drop" in axis.label else 2e-4 for axis in space.axes}
    trials.trial(values, space, None, lambda config, **others: given.append(config))
    assert (given[0].name, given[0].evaluation.where) == ("sweep-7", "inline")
    assert space.base.evaluation.where == "auto"  # and so is what the winner's file says


def test_dry_run_starts_nothing(space_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_parser(), run, [str(space_file), "--dry-run", "search.samples=2"]) == 0
    assert "4 trials" in capsys.readouterr().out


def test_faults_exit_2_before_ray(space_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_parser(), run, [str(space_file), "optim.drop_epoch=3"]) == 2
    assert "did you mean 'optim.drop_epochs'?" in capsys.readouterr().err
    folder = f"storage={tmp_path}/runs"
    assert main(build_parser(), run, [str(space_file), folder]) == 2
    assert "data.train is empty" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_missing_shards_are_found_before_ray(space: Space, tmp_path: Path) -> None:
    data = space.base.data.model_copy(update={"train": str(tmp_path / "no"), "val": str(tmp_path / "no")})
    with pytest.raises(ShardError):
        trials.prepare(Space(space.base.model_copy(update={"data": data}), space.search, space.axes))


def test_prepare_existing_sweep_name_raises(space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.preflight, "check_data", lambda config: None)
    (tmp_path / "sweep").mkdir()
    base = space.base.model_copy(update={"storage": str(tmp_path)})
    with pytest.raises(RunError, match=str(tmp_path / "sweep")):
        trials.prepare(Space(base, space.search, space.axes))


@pytest.mark.parametrize(
    ("outcomes", "code", "best"),
    [
        ([outcome("a", 0.1), outcome("b", None, status="failed", error="boom")], 0, "a"),
        ([outcome("a", None, status="failed", error="boom")], 1, None),
        ([outcome("a", 0.1), outcome("b", 0.2, status="interrupted")], 130, "b"),
        ([outcome("a", None, status="interrupted")], 130, None),
    ],
)
def test_sweep_writes_best_config_and_exit_code(
    space_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[Outcome],
    code: int,
    best: str | None,
) -> None:
    base = load_space(space_file).base.model_copy(update={"storage": str(tmp_path)})
    monkeypatch.setattr(trials, "prepare", lambda space: Space(base, space.search, space.axes))
    monkeypatch.setattr(trials, "run_trials", lambda space, parent_run_id: outcomes)
    monkeypatch.setattr("tune.sweep.start_run", lambda *args, **kwargs: None)  # as if MLflow did not answer
    assert main(build_parser(), run, [str(space_file)]) == code
    path = tmp_path / "best.yaml"
    assert path.exists() == (best is not None)
    assert best is None or f"trial {best}" in path.read_text()
