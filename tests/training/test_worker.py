"""The worker's bookkeeping that needs neither Ray nor data; whole runs are in integration/."""

from types import SimpleNamespace

import torch
from torch import nn

from pipeline.checkpoint import TrainState
from pipeline.engine.ema import WeightAverage
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
