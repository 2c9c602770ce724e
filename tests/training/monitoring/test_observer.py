"""The outputs of one rank's observer, with fakes for MLflow, dashboard and driver."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.checkpoint import TrainState
from pipeline.config import from_dict
from pipeline.engine.step import StepResult
from pipeline.runtime import Runtime, single
from pipeline.training.monitoring import observer as observer_module
from pipeline.training.monitoring.observer import Observer

STATE = TrainState({}, (), "digest", 1, 2, 6, 6)
EVALUATED = {"epoch": 0.0, "step": 4.0, "AP": 0.25, "AP50": 0.5}
LATER = TrainState({}, (), "digest", 2, 0, 8, 8)


class World:
    """Everything around an observer."""

    def __init__(self, folder: Path, runtime: Runtime, state: TrainState = STATE) -> None:
        self.metrics: dict[int, Mapping[str, float]] = {}
        self.posted: list[tuple[str, bool]] = []
        self.folder = folder
        logger: Any = SimpleNamespace(metrics=lambda values, step: self.metrics.update({step: values}))
        control = SimpleNamespace(
            post_progress=SimpleNamespace(remote=lambda line, keep: self.posted.append((line, keep)))
        )
        config = from_dict({"name": "run", "train": {"global_batch": 4, "epochs": 3}})
        self.observer = Observer(config, runtime, logger, str(folder), state, 12, control)

    def step(self, number: int, own: float = 0.0) -> None:
        losses = {"loss": float(number), "loss_ce": 0.5}
        for _ in self.observer.time_waits([0]):
            self.observer.step(StepResult(True, 1.0, losses, [1], forward_seconds=own), 1, number, lr=0.1)

    @property
    def lines(self) -> list[dict[str, Any]]:
        files = sorted(self.folder.glob("steps/*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """The last value of each gauge by (name, rank)."""
    shown: dict[tuple[str, str], float] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name
            assert tag_keys == ("run", "rank")

        def set(self, value: float, tags: dict[str, str]) -> None:
            shown[self.name, tags["rank"]] = value

    monkeypatch.setattr("pipeline.training.monitoring.gauges.Gauge", Gauge)
    return shown


def test_log_interval_reaches_mlflow_gauges_driver_and_file(
    tmp_path: Path, gauges: dict[tuple[str, str], float]
) -> None:
    world = World(tmp_path, single())
    world.step(7)
    world.step(8, own=0.5)
    world.observer.log(LATER, 1, {"main": 0.1}, (EVALUATED,))
    metrics = world.metrics[8]
    assert metrics["train/loss"] == 7.5
    assert metrics["lr/main"] == 0.1
    assert {"perf/images_per_s", "perf/data_wait_share", "perf/step_p50_s", "perf/step_p95_s"} <= metrics.keys()
    assert "perf/slowest_rank" not in metrics  # there is but one
    assert world.observer.images_per_s == metrics["perf/images_per_s"]
    [(line, keep)] = world.posted
    assert "epoch 2/3  step 8/12  loss 7.5000  AP 0.2500 (epoch 1)" in line
    assert not keep
    assert gauges["detector_loss", "0"] == 7.5
    assert gauges["detector_ap", "0"] == 0.25
    assert gauges["detector_own_seconds", "0"] == pytest.approx(0.25, abs=0.1)
    world.observer.flush()
    assert [(line["step"], line["loss"]) for line in world.lines] == [(7, 7.0), (8, 8.0)]
    assert world.lines[1]["forward_s"] == 0.5
    assert {"grad_norm", "lr", "applied", "seconds", "wait_s", "loss_ce"} <= world.lines[0].keys()


def test_show_evaluation_updates_the_progress_line(tmp_path: Path, gauges: dict[tuple[str, str], float]) -> None:
    world = World(tmp_path, single())
    world.observer.show_evaluation((EVALUATED,))  # one that was left over, before the first step
    assert world.posted == []
    world.step(7)
    world.observer.log(STATE, 1, {}, ())
    world.observer.show_evaluation((EVALUATED,))
    [before, after] = world.posted
    assert "AP -" in before[0]
    assert "AP 0.2500 (epoch 1)" in after[0]
    assert not after[1]


def test_log_with_a_straggler_names_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gauges: dict[tuple[str, str], float]
) -> None:
    table = [[0.1, 100.0], [0.4, 300.0]]
    monkeypatch.setattr(observer_module, "gather_values", lambda values, runtime: table)
    world = World(tmp_path, Runtime(0, 2, 0, torch.device("cpu")))
    world.step(7)
    world.observer.log(STATE, 1, {}, ())
    assert world.metrics[6]["perf/slowest_rank"] == 1
    assert world.metrics[6]["perf/slowest_rank_lag_s"] == pytest.approx(0.3)
    assert world.metrics[6]["perf/memory_mib"] == 300
    assert "AP -" in world.posted[0][0]


def test_log_on_rank_1_sets_only_its_own_gauges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gauges: dict[tuple[str, str], float]
) -> None:
    monkeypatch.setattr(observer_module, "gather_values", lambda values, runtime: [values, values])
    world = World(tmp_path, Runtime(1, 2, 1, torch.device("cpu")))
    world.step(7)
    world.observer.log(STATE, 1, {}, ())
    world.observer.close()
    assert {name for name, _ in gauges} == {"detector_step_seconds", "detector_own_seconds", "detector_memory_mib"}
    assert {rank for _, rank in gauges} == {"1"}
    assert world.metrics == {}
    assert world.posted == []
    assert world.lines == []


def test_post_progress_without_driver_does_not_raise(tmp_path: Path, gauges: dict[tuple[str, str], float]) -> None:
    world = World(tmp_path, single())

    def gone(line: str, keep: bool) -> None:
        raise ConnectionError

    world.observer._control.post_progress.remote = gone  # type: ignore[union-attr]
    world.observer.show_evaluation((EVALUATED,))
    world.observer.post_progress("anything")
    assert gauges["detector_ap", "0"] == 0.25
