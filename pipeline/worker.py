"""What Ray Train runs on each rank: composes data, model, engine, evaluation, checkpoints and tracking.

Started by `driver.py` with a JSON payload, again after every failure; it goes on from the last committed checkpoint.
The order of samples, augmentation and dropout are functions of (seed, epoch, step), so nothing else has to be restored.
"""

import json
import logging
import shutil
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import ray.train
import torch

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint, TrainState
from pipeline.config import Config, dump, from_dict
from pipeline.data.feed import feed
from pipeline.data.loader import TrainLoader
from pipeline.ema import start_average
from pipeline.engine import Engine, LossModule, OptimizerState
from pipeline.errors import CheckpointError
from pipeline.evaluation.coco import METRICS
from pipeline.evaluation.evaluator import Result, build_evaluator
from pipeline.evaluation.report import convergence_plot, per_category_ap, pictures, precision_recall_plot
from pipeline.meter import Meter
from pipeline.model import build_criterion, build_model
from pipeline.model.compiled import compile_regions
from pipeline.optim import lr_factor, set_learning_rates
from pipeline.runtime import from_environment, get_logger
from pipeline.tracking import RunLogger
from pipeline.training.batching import batch_arithmetic
from pipeline.training.determinism import make_deterministic
from pipeline.training.drift import check_drift
from pipeline.training.hang import HangDetector
from pipeline.training.nonfinite import NonFiniteGuard
from pipeline.training.precision import LossScale, check_precision
from pipeline.zero import DeepSpeedBackend

log = get_logger("worker")
NO_AP = -1.0  # reported before the first evaluation: Ray ranks checkpoints by val/AP and needs a number


def train_worker(payload: dict[str, Any]) -> None:
    """Entry point on every rank. `payload`: `config` (as `dump` gives it), `tracking_uri`, `run_id`."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it prints whole reports
    # DeepSpeed 0.19 calls a collective that torch 2.14 has renamed; nobody here can act on it.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    Worker(from_dict(payload["config"], "payload"), payload["tracking_uri"], payload["run_id"]).run()


class Worker:
    """One rank of a training run."""

    def __init__(self, config: Config, tracking_uri: str, run_id: str | None) -> None:
        self.config = config
        if config.train.deterministic:
            make_deterministic()
        self.runtime = from_environment(bool(config.scaling.use_gpu), max(1, int(config.scaling.cpus_per_worker)))
        if not self.runtime.is_main:
            logging.getLogger("pipeline").setLevel(logging.WARNING)  # what all ranks do is said by one
        self.logger = RunLogger(tracking_uri, run_id if self.runtime.is_main else None)
        check_precision(config.train.precision, self.runtime.device)
        rank, world = self.runtime.rank, self.runtime.world
        if self.runtime.is_main:
            log.info("each step: %s", batch_arithmetic(config.train, world))
        self.loader = TrainLoader(config.data, config.train, config.seed, rank, world)
        self.evaluator = build_evaluator(config.data, config.train, config.evaluation, self.runtime, self.loader.pool)
        torch.manual_seed(config.seed)  # the same initial weights on every rank; DeepSpeed broadcasts no buffers
        stored = ray.train.get_checkpoint()
        self.model = build_model(config.model, load_backbone=stored is None).to(self.runtime.device)
        if config.train.compile:
            compile_regions(self.model)
        criterion = build_criterion(config.loss)
        module = LossModule(self.model, criterion, config.train.precision)
        self.state = self._initial_state()
        loaded = self._restore(stored) if stored else None
        self.average = start_average(self.model, config.train.ema_decay, loaded.average if loaded else None)
        self.backend = DeepSpeedBackend(module, config.train, config.optim, self.runtime)
        scale = LossScale(**self.state.loss_scale) if self.state.loss_scale else None
        moments = loaded.moments if loaded else {}
        self.backend.load_optimizer_state(OptimizerState(self.state.optimizer_step, moments, scale))
        self.engine = Engine(module, self.backend, self.runtime, config.seed)
        self.hang = HangDetector(60 * config.train.hang_minutes, rank, Path.cwd())
        self.nonfinite = NonFiniteGuard(self.engine, self.runtime, config.train.nonfinite_limit, self.logger.text)
        self._images_per_s = 0.0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.config.train.epochs * self.loader.steps_per_epoch
        return min(steps, self.config.train.max_steps or steps)

    def run(self) -> None:
        """Train from the current state to the last step."""
        meter = Meter(self.config.train.global_batch, self.state.global_step, self.total_steps)
        try:
            with self.hang.watching():
                while self.state.global_step < self.total_steps:
                    self._run_epoch(meter)
        finally:
            self.logger.close()

    def _run_epoch(self, meter: Meter) -> None:
        train, epoch = self.config.train, self.state.epoch
        left = self.total_steps - self.state.global_step  # the loader's processes are then free for the evaluation
        steps = islice(self.loader.epoch(epoch, self.state.step), left)
        batches = meter.waits(feed(steps, self.runtime.device))
        for step, groups in enumerate(batches, start=self.state.step):
            factor = lr_factor(self.config.optim, epoch, self.state.global_step, self.total_steps)
            rates = set_learning_rates(self.backend.optimizer, factor)
            result = self.engine.train_step(groups, self.state.global_step)
            self.hang.rearm()
            self.nonfinite.check(result, groups, self.state.global_step)
            meter.add(result)
            last_of_epoch = step + 1 == self.loader.steps_per_epoch
            self._advance(result.applied, epoch + last_of_epoch, 0 if last_of_epoch else step + 1)
            if train.drift_steps and self.state.global_step % train.drift_steps == 0:
                check_drift(self.model, self.runtime, self.state.global_step, divided=train.zero_stage == 3)
            done = self.state.global_step == self.total_steps
            evaluate = done or (last_of_epoch and (epoch + 1) % train.eval_epochs == 0)
            if evaluate or self.state.global_step % train.log_steps == 0:
                self._log(meter, epoch, rates)
            with meter.paused(), self.hang.paused():
                if evaluate:
                    self._evaluate(epoch)
                if evaluate or (train.checkpoint_steps and self.state.global_step % train.checkpoint_steps == 0):
                    self._save()
            if done:
                return

    def _advance(self, applied: bool, epoch: int, step: int) -> None:
        self.state = replace(
            self.state,
            epoch=epoch,
            step=step,
            global_step=self.state.global_step + 1,
            optimizer_step=self.state.optimizer_step + applied,
        )
        if applied and self.average:
            self.average.update(self.model, self.state.optimizer_step)

    def _log(self, meter: Meter, epoch: int, rates: dict[str, float]) -> None:
        metrics = meter.flush()
        self._images_per_s = metrics["perf/images_per_s"]
        if not self.runtime.is_main:
            return
        metrics |= {f"lr/{name}": rate for name, rate in rates.items()} | {"epoch": float(epoch)}
        self.logger.metrics(metrics, self.state.global_step)
        log.info("%s", meter.line(epoch, self.state.metrics.get("AP")))

    def _evaluate(self, epoch: int) -> None:
        start = time.monotonic()
        eager = torch.compiler.set_stance("force_eager") if self.config.train.compile else nullcontext()
        with eager:
            result = self.evaluator.run(self.average.model if self.average else self.backend.whole_model())
        if result is None:
            return
        entry = {"epoch": float(epoch), "step": float(self.state.global_step), **result.metrics}
        history = (*self.state.history, entry)
        self.state = replace(self.state, metrics=result.metrics, history=history)
        metrics = {f"val/{name}": result.metrics[name] for name in METRICS}
        self.logger.metrics({**metrics, "val/seconds": time.monotonic() - start}, self.state.global_step)
        with tempfile.TemporaryDirectory() as folder:
            self._log_report(result, Path(folder), f"epoch_{epoch:03d}")
        log.info("epoch %d: AP %.4f  AP50 %.4f", epoch, result.metrics["AP"], result.metrics["AP50"])

    def _log_report(self, result: Result, folder: Path, name: str) -> None:
        """Results file, AP per category, plots and pictures of this evaluation as MLflow artifacts."""
        result.detections.to_results_json(folder / f"{name}.json")
        self.logger.artifact(folder / f"{name}.json", "results")
        by_id = {category.id: category.name for category in self.state.categories}
        table = {by_id[category]: ap for category, ap in per_category_ap(result.scores).items()}
        self.logger.text(json.dumps(table, indent=1), f"results/{name}_categories.json")
        precision_recall_plot(result.scores, folder / f"precision_recall_{name}.png")
        self.logger.artifact(folder / f"precision_recall_{name}.png", "plots")
        convergence_plot(self.state.history, folder / "convergence.png")
        self.logger.artifact(folder / "convergence.png", "plots")
        for image_id, picture in pictures(result.detections, self.evaluator.loader.data, by_id).items():
            picture.save(folder / f"{image_id}.png")
            self.logger.artifact(folder / f"{image_id}.png", f"detections/{name}")

    def _save(self) -> None:
        """Checkpoint through Ray Train from all ranks; returns once Ray has committed it.

        Only a checkpoint that was itself evaluated carries an AP: Ray and `run.json` choose the best one by it.
        """
        self.logger.flush()  # what is logged up to here is not logged again after a resume
        optimizer_state, weights = self.backend.optimizer_state(), self.backend.whole_model().state_dict()
        if optimizer_state.loss_scale:
            self.state = replace(self.state, loss_scale=asdict(optimizer_state.loss_scale))
        stored = None
        if self.runtime.is_main:
            folder = Path(tempfile.mkdtemp(prefix="checkpoint_"))
            average = self.average.model.state_dict() if self.average else None
            checkpoint.save(folder, self.state, weights, optimizer_state.moments, average)
            stored = ray.train.Checkpoint.from_directory(folder)
        history = self.state.history
        evaluated = bool(history) and history[-1]["step"] == self.state.global_step
        metrics = {f"val/{name}": history[-1][name] if evaluated else NO_AP for name in METRICS}
        progress = {
            "epoch": self.state.epoch,
            "global_step": self.state.global_step,
            "perf/images_per_s": self._images_per_s,
        }
        ray.train.report({**metrics, **progress}, checkpoint=stored)
        # `report` returns before the controller has registered the checkpoint; a death in between would lose it.
        ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)
        if stored is not None:
            shutil.rmtree(stored.path, ignore_errors=True)

    def _initial_state(self) -> TrainState:
        index = self.loader.index
        return TrainState(dump(self.config), index.categories, index.digest, 0, 0, 0, 0)

    def _restore(self, stored: ray.train.Checkpoint) -> Checkpoint:
        """Take over weights and state of a checkpoint; returns all of it."""
        with stored.as_directory() as folder:
            loaded = checkpoint.load(folder)
        if loaded.state.data_digest != self.loader.index.digest:
            raise CheckpointError(
                f"the checkpoint was trained on other shards than {self.config.data.train} (digest differs); "
                "give the same data.train or start a new run name"
            )
        checkpoint.restore_weights(self.model, loaded.weights)
        self.state = replace(loaded.state, config=dump(self.config))
        log.info("resumed at epoch %d, step %d", self.state.epoch, self.state.step)
        return loaded
