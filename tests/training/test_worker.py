"""The worker's bookkeeping that needs neither Ray nor data; whole runs are in integration/."""

import math
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from pipeline.checkpoint import TrainState
from pipeline.config import from_dict
from pipeline.engine.ema import WeightAverage
from pipeline.engine.step import PendingStep
from pipeline.runtime import single
from pipeline.training.worker import Worker


def test_advance_skipped_step_counts_but_keeps_the_average() -> None:
    worker = object.__new__(Worker)  # its __init__ needs a process group and shards
    worker.state = TrainState({}, (), "digest", 0, 0, 0, 0)
    worker.loader = SimpleNamespace(steps_per_epoch=5)  # type: ignore[assignment]
    worker.model = nn.Linear(2, 2)  # type: ignore[assignment]  # any module can be averaged
    worker.average = WeightAverage(worker.model, 0.5)
    before = worker.average.model.weight.clone()
    with torch.no_grad():
        worker.model.weight += 1
    worker._advance()
    worker._count(applied=False)
    assert torch.equal(worker.average.model.weight, before)
    worker._advance()
    worker._count(applied=True)
    assert not torch.equal(worker.average.model.weight, before)
    assert (worker.state.global_step, worker.state.optimizer_step) == (2, 1)


def test_end_by_time_is_said_once_and_not_if_the_run_was_asked_to_stop() -> None:
    worker = object.__new__(Worker)
    worker.runtime = single()
    worker.config = from_dict({"train": {"max_minutes": 5}})
    worker.clock, worker.observer, worker.stop_monitor = Mock(), Mock(), Mock(reason="SIGTERM")
    assert not worker._is_out_of_time()
    worker.observer.post_progress.assert_not_called()
    worker.stop_monitor.reason = ""
    assert worker._is_out_of_time()
    assert "train.max_minutes=5" in worker.observer.post_progress.call_args.args[0]


class LoaderReachedError(Exception):
    """Ends a worker's start where it opens the data."""


def test_matmul_precision_is_set_for_training_and_highest_for_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    config = from_dict({"name": "run", "storage": str(tmp_path), "train": {"matmul_precision": "high"}})
    monkeypatch.setattr("pipeline.training.worker.from_environment", lambda use_gpu, threads: single())
    monkeypatch.setattr("pipeline.training.worker.RunLogger", lambda *args: None)
    monkeypatch.setattr("pipeline.training.worker.TrainLoader", Mock(side_effect=LoaderReachedError))
    used: list[str] = []
    before = torch.get_float32_matmul_precision()
    try:
        with pytest.raises(LoaderReachedError):
            Worker(config, "sqlite://", "run-id", None)
        used.append(torch.get_float32_matmul_precision())
        worker = object.__new__(Worker)
        worker.config = config
        worker.evaluation = SimpleNamespace(  # type: ignore[assignment]
            run=lambda *args: used.append(torch.get_float32_matmul_precision())
        )
        worker.average = SimpleNamespace(model=None)  # type: ignore[assignment]
        worker.state = TrainState({}, (), "digest", 0, 0, 0, 0)
        worker.history = ()
        worker._evaluate()
        used.append(torch.get_float32_matmul_precision())
    finally:
        torch.set_float32_matmul_precision(before)
    assert used == ["high", "highest", "high"]


class FakeEngine:
    """Starts steps whose results are known at once; step 2 has a NaN, and a rank is asked to stop at step 4."""

    delays = True

    def start_step(self, groups: list[Any], step: int, stop: bool) -> PendingStep:
        numbers = torch.tensor([1.0, 1.0, float(step == 4), math.nan if step == 2 else 1.0])
        return PendingStep(["loss_ce"], numbers, None, None, {"loss_ce": 1.0}, [step], 0.0)


def test_read_results_takes_each_once_in_order_with_its_own_groups() -> None:
    """One step stays unread until it must be read; a skipped step is checked with the groups that it had."""
    worker = object.__new__(Worker)
    worker.state = TrainState({}, (), "digest", 0, 0, 0, 0)
    worker.loader = SimpleNamespace(steps_per_epoch=3)  # type: ignore[assignment]
    worker.average = None
    worker.unread = deque()
    worker.engine = FakeEngine()  # type: ignore[assignment]
    worker.stop_monitor = SimpleNamespace(should_stop=lambda step: False)  # type: ignore[assignment]
    worker.clock = SimpleNamespace(is_over=lambda: False)  # type: ignore[assignment]
    worker.hang = SimpleNamespace(rearm=lambda: None)  # type: ignore[assignment]
    checked: list[tuple[bool, Any, int]] = []
    seen: list[tuple[int, int]] = []
    worker.nonfinite = SimpleNamespace(  # type: ignore[assignment]
        check=lambda result, groups, step: checked.append((result.applied, groups, step))
    )
    worker.observer = SimpleNamespace(  # type: ignore[assignment]
        step=lambda result, epoch, number, lr: seen.append((epoch, number))
    )
    stops = []
    for step in range(6):
        worker._start_step([step], worker.state.epoch, 0.1)  # type: ignore[list-item]
        stops.append(worker._read_results(keep=1))
        assert len(worker.unread) == 1
        assert worker.state.global_step == step + 1
    assert stops == [False] * 5 + [True]  # step 4 was read after step 5 had started
    assert not worker._read_results()
    assert not worker.unread
    assert checked == [(step != 2, [step], step) for step in range(6)]
    assert seen == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6)]
    assert (worker.state.global_step, worker.state.optimizer_step) == (6, 5)
