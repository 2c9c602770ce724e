"""One short training in this process, on one thread, with the project's loader, engine and evaluation.

It starts neither Ray nor DeepSpeed nor MLflow, whose start would cost as much as the training itself. The steps are the
same: tests compare `PlainBackend` with DeepSpeed, and order, augmentation and dropout are functions of the seed. On one
thread and a CPU the same config gives the same bits, whatever else runs on the machine. Raises what its parts raise.
"""

import fcntl
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.data.index import load_index
from pipeline.data.loader import TrainLoader
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.engine.backend import PlainBackend
from pipeline.engine.cpu_tuning import KEEP_FREED_MEMORY, tune_model
from pipeline.engine.module import LossModule
from pipeline.engine.optim import lr_factor, set_learning_rates
from pipeline.engine.step import Engine
from pipeline.errors import RunError
from pipeline.evaluation.evaluator import Result, build_evaluator
from pipeline.model import build_criterion, build_model
from pipeline.model.detector import Detector
from pipeline.runtime import single

BASE = Path(__file__).parent / "base.yaml"
METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
DIGITS = 4  # of a recorded AP and loss


@dataclass(frozen=True)
class Drawn:
    """The data set: drawn images of one mean side, as many to train and to evaluate on."""

    train: int
    val: int
    side: int

    @property
    def description(self) -> str:
        """For people."""
        return f"{self.train} drawn images to train on, {self.val} to evaluate on, about {self.side} px"


@dataclass(frozen=True)
class Outcome:
    """What a training has left."""

    curve: list[dict[str, float]]  # `epoch` (finished ones) and METRICS, of each evaluation
    loss: float  # mean of the last epoch
    seconds: float  # of processor time, for training and evaluations
    parameters: int

    @property
    def final(self) -> dict[str, float]:
        """The last evaluation: no epoch is chosen by its AP."""
        return self.curve[-1]


def draw_data(drawn: Drawn, folder: Path) -> dict[str, str]:
    """Draw and shard both splits where they are missing; returns the digest of each."""
    digests = {}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "drawing.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second call waits; the kernel ends the lock with its process
        for seed, (split, images) in enumerate((("train", drawn.train), ("val", drawn.val))):
            shards = folder / split
            if not (shards / "index.json").exists():
                annotations, files = write_synthetic(folder / "raw" / split, images=images, seed=seed, size=drawn.side)
                build_shards(annotations, files, shards, workers=1)
            index = load_index(str(shards))
            if len(index) != images:
                raise RunError(
                    f"{shards} has {len(index)} images instead of {images}; delete {folder} to draw it again"
                )
            digests[split] = index.digest
    return digests


def train_and_evaluate(
    config: Config,
    say: Callable[[str], None] = lambda line: None,
    finish: Callable[[Detector, Result], None] = lambda model, result: None,
) -> Outcome:
    """Train as `config` says, from nothing or from `model.init_from`, and evaluate every `train.eval_epochs`.

    Args:
        config: with `data.train` and `data.val`.
        say: gets a line after each evaluation.
        finish: gets the trained model and its last evaluation.

    Raises:
        RunError: the gradients of `train.nonfinite_limit` steps in a row were not finite.
    """
    torch.set_num_threads(1)
    start, runtime = time.process_time(), single()
    torch.manual_seed(config.seed)
    module = LossModule(build_model(config.model), build_criterion(config.loss))
    tune_model(module.model, config.train, runtime.device)
    engine = Engine(module, PlainBackend(module, config.optim, runtime.device), runtime, config.seed)
    loader = TrainLoader(config.data, config.train, config.seed, rank=0, world=1)
    evaluator = build_evaluator(config.data, config.evaluation, runtime, loader.pool)
    total, step, skipped = config.train.epochs * loader.steps_per_epoch, 0, 0
    losses, curve = [0.0], []
    for epoch in range(config.train.epochs):
        losses = []
        for batches in loader.epoch(epoch):
            set_learning_rates(engine.backend.optimizer, lr_factor(config.optim, epoch, step, total))
            result = engine.train_step(batches, step)
            skipped = 0 if result.applied else skipped + 1
            if skipped == config.train.nonfinite_limit:
                raise RunError(f"the gradients of {skipped} steps in a row up to step {step} are not finite")
            losses += [result.losses["loss"]] if result.applied else []
            step += 1
        if (epoch + 1) % config.train.eval_epochs and epoch + 1 < config.train.epochs:
            continue
        found = evaluator.run(module.model)
        assert found is not None  # one process is rank 0
        curve.append({"epoch": epoch + 1, **{name: round(found.metrics[name], DIGITS) for name in METRICS}})
        spent, ap = time.process_time() - start, curve[-1]["AP"]
        say(f"epoch {epoch + 1} of {config.train.epochs}: AP {ap:.3f}, {spent:.0f} s of processor time")
        if epoch + 1 == config.train.epochs:
            finish(module.model, found)
    loss = round(sum(losses) / len(losses), DIGITS)
    seconds = round(time.process_time() - start, 1)
    return Outcome(curve, loss, seconds, sum(p.numel() for p in module.model.parameters()))


def restart_with_allocator(module: str) -> None:
    """Replace this process by the same command with the allocator that our workers get, unless it has it."""
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **KEEP_FREED_MEMORY})
