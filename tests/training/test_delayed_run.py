"""A worker's whole run with `train.delay_results`: a skipped step, a checkpoint and a stop read what is not read yet.

The fused AdamW of a GPU runs on the CPU here. Ray's part (where checkpoints go, who asks to stop) is replaced; loader,
model, DeepSpeed, engine, guard and the loop are those of a run.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support.distributed import run_ranks
from support.paths import ROOT
from torch import Tensor

from pipeline.checkpoint import TrainState
from pipeline.config import load_config
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.engine import zero
from pipeline.engine.optim import build_optimizer
from pipeline.runtime import Runtime
from pipeline.training import worker

SPOILED, CHECKPOINT, END = 1, 2, 4  # the step with NaN, from 0; steps after which the run saves, and stops
SETTINGS = {
    "data.augment.scales": [64],
    "data.augment.eval_size": 64,
    "data.augment.max_size": 96,
    "model.hidden_dim": 32,
    "model.heads": 4,
    "model.ffn_dim": 32,
    "model.enc_layers": 1,
    "model.dec_layers": 2,
    "model.queries": 10,
    "model.backbone.width": 8,
    "train.global_batch": 4,
    "train.micro_batch": 2,
    "train.zero_stage": "auto",
    "train.checkpoint_steps": CHECKPOINT,
    "train.log_steps": 1000,
    "train.drift_steps": 0,
    "evaluation.where": "tasks",
    "name": "run",
}


@dataclass
class Record:
    """What a run did."""

    read: list[tuple[int, int, bool]] = field(default_factory=list)  # step, steps started by then, whether applied
    saved: list[tuple[TrainState, dict[str, Tensor], dict[str, Any]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def train(runtime: Runtime, folder: Path, delay: bool) -> tuple[bool, Record]:
    """Run a worker until it is asked to stop; whether its engine delayed results, and what it did."""
    values = {
        **SETTINGS,
        "storage": str(folder),
        "data.train": str(folder / "shards"),
        "data.val": str(folder / "shards"),
    }
    overrides = [f"{key}={value}" for key, value in {**values, "train.delay_results": str(delay).lower()}.items()]
    config = load_config(ROOT / "jobs" / "configs" / "demo.yaml", overrides)
    record = Record()
    # A request is noticed with the result of its step: with delayed results after one more step.
    asked = END - 1 - delay
    with ExitStack() as stack:
        for name, stand_in in stand_ins(runtime, record, asked).items():
            stack.enter_context(mock.patch.object(worker, name, stand_in))
        fused = lambda model, optim, _: build_optimizer(model, optim, torch.device("cuda"))  # noqa: E731  # a patch
        stack.enter_context(mock.patch.object(zero, "build_optimizer", fused))
        process = worker.Worker(config, "sqlite://", None, None)
        process.observer.started = lambda: process.state.global_step  # type: ignore[attr-defined]
        process.run()
    assert not process.unread
    return process.engine.delays, record


def train_twice(runtime: Runtime, folder: Path) -> dict[bool, tuple[bool, Record]]:
    """Without and with delayed results, in one process."""
    return {delay: train(runtime, folder, delay) for delay in (False, True)}


def stand_ins(runtime: Runtime, record: Record, asked: int) -> dict[str, Any]:
    """What takes the place of Ray, MLflow and the loader's end in `worker`."""

    class Observer:
        """Notes each result that is read."""

        images_per_s = 0.0

        def __init__(self, *_: Any) -> None:
            self.started = lambda: 0

        def step(self, result: Any, epoch: int, step: int, lr: float) -> None:
            record.read.append((step - 1, self.started(), result.applied))

        def time_waits(self, items: Iterable[Any]) -> Iterator[Any]:
            yield from items

        @contextmanager
        def pause(self) -> Iterator[None]:
            yield

        def log(self, *_: Any) -> None:
            """Nothing is logged."""

        flush = close = post_progress = log

    def save(
        state: TrainState, weights: dict[str, Tensor], moments: Any, average: Any, metrics: dict[str, Any], *_: Any
    ) -> None:
        record.saved.append((state, {name: weight.clone() for name, weight in weights.items()}, metrics))

    def spoil(steps: Iterable[Any], device: torch.device) -> Iterator[Any]:
        for number, groups in enumerate(steps):
            groups = [group.to(device) for group in groups]
            if number == SPOILED:
                groups[0].images[0] = float("nan")
            yield groups

    logger = SimpleNamespace(text=lambda text, file: record.texts.append(text), close=lambda seconds: None)
    return {
        "from_environment": lambda *_: runtime,
        "RunLogger": lambda *_: logger,
        "restore": lambda _: None,
        "is_evaluation_pending": lambda _: False,
        "read_history": lambda *_: (),
        "TaskEvaluations": lambda _: None,
        "Observer": Observer,
        "Saver": lambda *_: SimpleNamespace(save=lambda *a, entry=None, validate=False: save(*a), commit=lambda: None),
        "StopMonitor": lambda *_, **__: SimpleNamespace(
            should_stop=lambda step: step >= asked, wants_checkpoint=lambda: False, reason="asked"
        ),
        "feed": spoil,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Record]:
    """The same run, with results read at once and delayed."""
    folder = tmp_path_factory.mktemp("delayed")
    annotations, images = write_synthetic(folder / "raw", images=24, seed=0, size=64)
    build_shards(annotations, images, folder / "shards")
    (folder / "run").mkdir()
    (found,) = run_ranks(train_twice, 1, folder, folder)
    assert {delay: delays for delay, (delays, _) in found.items()} == {False: False, True: True}
    return {delay: record for delay, (_, record) in found.items()}


def test_delayed_run_reads_each_result_after_the_next_start_and_all_before_a_checkpoint(
    runs: dict[bool, Record],
) -> None:
    assert runs[False].read == [(0, 1, True), (1, 2, False), (2, 3, True), (3, 4, True)]
    assert runs[True].read == [(0, 2, True), (1, 2, False), (2, 4, True), (3, 4, True)]


def test_delayed_run_saves_the_same_states_and_weights(runs: dict[bool, Record]) -> None:
    """Also after the step that was skipped, and where it stopped."""
    for run in runs.values():
        assert [state.global_step for state, _, _ in run.saved] == [CHECKPOINT, END]
        assert [state.optimizer_step for state, _, _ in run.saved] == [CHECKPOINT - 1, END - 1]
        assert [worker.STOPPED in metrics for _, _, metrics in run.saved] == [False, True]
    for (_, at_once, _), (_, delayed, _) in zip(runs[False].saved, runs[True].saved, strict=True):
        for name, weight in at_once.items():
            assert weight.isfinite().all(), name
            torch.testing.assert_close(delayed[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_delayed_run_describes_the_skipped_step_with_its_own_images(runs: dict[bool, Record]) -> None:
    assert [len(run.texts) for run in runs.values()] == [1, 1]
    assert "nan" in runs[True].texts[0].lower()
