"""Runs that were trained with a preset are found by their recipe, under any name."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, TrackingConfig, flatten, override
from pipeline.presets.trained import find_trained
from pipeline.tracking.client import connect
from pipeline.tracking.run import as_params, finish_run, start_run

PRESETS = {"plain": Config(name="plain"), "refined": override(Config(name="refined"), ["model.refine=true"])}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("trained")
    return f"sqlite:///{folder}/mlflow.db"


def log_run(uri: str, name: str, ap: float | None, *changes: str, status: str = "FINISHED", **rest: Any) -> str:
    config = override(Config(), [f"name={name}", f"tracking.uri={uri}", *changes])
    run_id = start_run(TrackingConfig(uri=uri, **rest), config, name)
    assert run_id is not None
    if ap is not None:
        client = connect(uri)
        client.log_metric(run_id, "val/AP", ap / 2, step=1)
        client.log_metric(run_id, "val/AP", ap, step=2)
    finish_run(uri, run_id, status)
    return run_id


def test_find_trained_matches_runs_by_recipe(uri: str) -> None:
    log_run(uri, "older", 0.40)
    mine = log_run(uri, "mine", 0.42, "scaling.num_workers=8", "model.op=torch", "train.compile=true", "seed=7")
    log_run(uri, "other-rate", 0.5, "optim.lr=1e-3")
    log_run(uri, "short", 0.01, "train.max_steps=4")
    log_run(uri, "tuned", 0.6, "model.init_from=weights.pth")
    log_run(uri, "killed", 0.5, status="KILLED")
    log_run(uri, "never-evaluated", None)
    refined = log_run(uri, "refined-once", 0.45, "model.refine=true", experiment="another")
    found = find_trained(uri, PRESETS)
    assert {name: (run.name, run.run_id) for name, run in found.items()} == {
        "plain": ("mine", mine),
        "refined": ("refined-once", refined),
    }
    assert found["plain"].ap == pytest.approx(42)


def test_find_trained_missing_setting_counts_as_default(uri: str) -> None:
    """It lacks the parameter; what it did is what is the default now."""
    changes = ["optim.clip=0.3"]
    preset = {"clipped": override(Config(), changes)}
    client = connect(uri)
    run_id = client.create_run(
        client.get_experiment_by_name("deformable-detr").experiment_id, run_name="old"
    ).info.run_id
    for key, value in as_params(flatten(preset["clipped"])).items():
        if key not in ("train.ema_decay", "evaluation.flip"):
            client.log_param(run_id, key, value)
    client.log_metric(run_id, "val/AP", 0.3)
    finish_run(uri, run_id, "FINISHED")
    assert find_trained(uri, preset)["clipped"].run_id == run_id


def test_find_trained_reads_all_pages(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = find_trained(uri, PRESETS)
    monkeypatch.setattr("pipeline.presets.trained.PAGE", 1)
    assert find_trained(uri, PRESETS) == whole
