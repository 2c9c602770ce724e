"""What Ray Train runs on each rank: composes data, model, engine, evaluation, checkpoints and tracking.

Ray calls `train_worker` with the driver's payload, and again after every failure. It continues from the last complete
checkpoint. The order of samples, augmentation and dropout are functions of (seed, epoch, step), so a checkpoint need
not hold them. Every error ends the worker; Ray then restarts all workers or ends the run.
"""

import logging
import warnings
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint, TrainState
from pipeline.config import Config, dump, from_dict
from pipeline.data.batch import Batch
from pipeline.data.feed import feed
from pipeline.data.loader import TrainLoader
from pipeline.engine.backend import OptimizerState
from pipeline.engine.batching import batch_arithmetic
from pipeline.engine.cpu_tuning import tune_model, use_channels_last
from pipeline.engine.ema import start_average
from pipeline.engine.memory import is_out_of_memory, memory_error
from pipeline.engine.module import LossModule
from pipeline.engine.optim import lr_factor, rates_for_batch, set_learning_rates
from pipeline.engine.precision import LossScale, check_precision
from pipeline.engine.step import Engine, PendingStep, StepResult
from pipeline.engine.zero import DeepSpeedBackend
from pipeline.errors import CheckpointError, RunError
from pipeline.evaluation.evaluator import build_evaluator
from pipeline.evaluation.inline import InlineEvaluation, is_due, is_last
from pipeline.evaluation.verification.request import Place
from pipeline.files.scratch import sweep
from pipeline.files.storage import exists, join
from pipeline.logs import get_logger, log_to_driver
from pipeline.model import build_criterion, build_model
from pipeline.model.compiled import compile_regions
from pipeline.runs.evaluations import Entry, History, read_history
from pipeline.runtime import from_environment, make_deterministic
from pipeline.tracking.client import RESTART_SECONDS, leave_retries_to_logger
from pipeline.tracking.logger import RunLogger
from pipeline.training.ending import Clock, describe_patience, describe_time, is_out_of_patience
from pipeline.training.guards.drift import check_drift
from pipeline.training.guards.hang import HangDetector
from pipeline.training.guards.nonfinite import NonFiniteGuard
from pipeline.training.monitoring.observer import Observer
from pipeline.training.restoring import restore
from pipeline.training.saving import STOPPED, Saver, is_evaluation_pending
from pipeline.training.stopping import TERMINATED, StopMonitor
from pipeline.training.task_evaluations import TaskEvaluations

log = get_logger("worker")


def train_worker(payload: dict[str, Any]) -> None:
    """Entry point on every rank. `payload`: `config` (as `dump` gives it), `tracking_uri`, `run_id`, `control`."""
    log_to_driver()
    sweep()  # temporary files of a worker that was killed on this node
    leave_retries_to_logger()

    # DeepSpeed 0.19 calls a collective that torch 2.14 has renamed; users cannot act on the warning.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    config = from_dict(payload["config"], "payload")
    try:
        Worker(config, payload["tracking_uri"], payload["run_id"], payload["control"]).run()
    except Exception as error:
        if is_out_of_memory(error):
            raise memory_error(config, bool(config.scaling.use_gpu), error) from error
        raise


@dataclass(frozen=True)
class StartedStep:
    """A step whose result was not taken yet."""

    result: PendingStep | StepResult
    groups: list[Batch]  # kept for the description of a step that was not applied
    number: int
    epoch: int
    lr: float


class Worker:
    """One rank of a training run."""

    def __init__(self, config: Config, tracking_uri: str, run_id: str | None, control: Any | None) -> None:
        self.config = config
        folder = join(config.storage, config.name)
        # A node may join after the driver's check. The folder is tested, because run.json may be missing for a while.
        if not exists(folder):
            raise RunError(f"this node does not see {folder}: set storage to a folder that all nodes share, or a URL")
        if config.train.deterministic:
            make_deterministic()
        self.runtime = from_environment(bool(config.scaling.use_gpu), max(1, int(config.scaling.cpus_per_worker)))
        if not self.runtime.is_main:
            logging.getLogger("pipeline").setLevel(logging.WARNING)  # rank 0 logs what all ranks do
        self.logger = RunLogger(tracking_uri, run_id if self.runtime.is_main else None)
        self.place = Place(0, folder, run_id or "", tracking_uri)  # of the verdict on the last evaluation
        check_precision(config.train.precision, self.runtime.device)
        torch.set_float32_matmul_precision(config.train.matmul_precision)
        rank, world = self.runtime.rank, self.runtime.world
        if self.runtime.is_main:
            log.info("each step: %s", batch_arithmetic(config.train, world))
        self.loader = TrainLoader(config.data, config.train, config.seed, rank, world)
        self.evaluation: InlineEvaluation | None = None  # None: Ray tasks evaluate
        if config.evaluation.where != "tasks":
            evaluator = build_evaluator(config.data, config.evaluation, self.runtime, self.loader.pool)
            self.evaluation = InlineEvaluation(evaluator, self.logger, folder)
        torch.manual_seed(config.seed)  # the same initial weights on every rank; DeepSpeed broadcasts no buffers
        loaded = restore(self.runtime)
        self.model = build_model(config.model, load_backbone=loaded is None).to(self.runtime.device)
        # Channels come last only after DeepSpeed has sent the weights to all ranks: it cannot send that layout.
        tune_model(self.model, config.train.model_copy(update={"channels_last": False}), self.runtime.device)
        if config.train.compile:
            compile_regions(self.model)
        criterion = build_criterion(config.loss)
        train = config.train
        module = LossModule(self.model, criterion, train.precision, train.cast_weights_once, train.fold_norms)
        self.state = self._load_checkpoint(loaded) if loaded else self._initial_state()
        self.average = start_average(self.model, config.train.ema_decay, loaded.average if loaded else None)
        optim = rates_for_batch(config.optim, train.global_batch)
        self.backend = DeepSpeedBackend(module, config.train, optim, self.runtime)
        if config.train.channels_last and not self.backend.divides:
            use_channels_last(self.model)
        scale = LossScale(**self.state.loss_scale) if self.state.loss_scale else None
        moments = loaded.moments if loaded else {}
        self.backend.load_optimizer_state(OptimizerState(self.state.optimizer_step, moments, scale))
        # A trace begins and ends with a step, so each step is finished before the next.
        delay = config.train.delay_results and config.train.profile_steps is None
        self.engine = Engine(module, self.backend, self.runtime, config.seed, delay)
        self.unread: deque[StartedStep] = deque()
        self.hang = HangDetector(60 * config.train.hang_minutes, rank, Path.cwd())
        self.nonfinite = NonFiniteGuard(self.engine, self.runtime, config.train.nonfinite_limit, self.logger.text)
        self.saver = Saver(self.runtime, self.logger, folder, config.train.checkpoint_upload)
        self.stop_monitor = StopMonitor(control, rank, elastic=config.scaling.min_workers is not None)
        self.clock = Clock(folder, train.max_minutes if self.runtime.is_main else None)
        self.time_is_up = False
        self.tasks = TaskEvaluations(folder) if self.evaluation is None and self.runtime.is_main else None
        self.history = read_history(folder, self.state.global_step) if self.runtime.is_main else ()
        self.observer = Observer(config, self.runtime, self.logger, folder, self.state, self.total_steps, control)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.config.train.epochs * self.loader.steps_per_epoch
        return min(steps, self.config.train.max_steps or steps)

    def run(self) -> None:
        """Train from the current state to the last step, or until the run is asked to stop."""
        try:
            self.time_is_up = self.state.global_step > 0 and self._is_out_of_time()
            if self._evaluation_is_missing():
                self._evaluate_and_save()
            with self.hang.watch():
                ended = self.time_is_up or self._is_out_of_patience()
                while self.state.global_step < self.total_steps and not ended:
                    ended = self._run_epoch()
            self.saver.commit()
            if self.evaluation:
                self.evaluation.settle()
            elif self.state.global_step == self.total_steps:
                self.observer.post_progress(f"all {self.total_steps} steps are done, the last evaluation is running")
        finally:
            self.clock.save()
            self.observer.close()
            # A node that is taken away does not wait for a server that is down.
            self.logger.close(None if self.stop_monitor.reason else RESTART_SECONDS)

    def _evaluation_is_missing(self) -> bool:
        """Whether an earlier start stopped before an evaluation that was due, and no task does it. A collective."""
        step = self.state.global_step
        due = self.time_is_up or is_due(self.state, self.config.train.eval_epochs, self.total_steps)
        done = any(entry["step"] == step for entry in self.history)  # only rank 0 has a history
        return self._agree(due and not done and not (self.evaluation is None and is_evaluation_pending(step)))

    def _agree(self, answer: bool) -> bool:
        """The answer of rank 0, on all ranks. A collective."""
        answers = [answer]
        if self.runtime.world > 1:
            dist.broadcast_object_list(answers, src=0)
        return answers[0]

    def _is_out_of_patience(self) -> bool:
        """Whether `train.patience` ends the run with the evaluations so far. A collective."""
        patience = self.config.train.patience
        if patience is None:
            return False
        ends = self._agree(is_out_of_patience(self.history, patience))
        if ends and self.runtime.is_main:
            self.observer.post_progress(describe_patience(self.history, patience), keep=True)
        return ends

    def _is_out_of_time(self) -> bool:
        """Whether `train.max_minutes` ends the run, unless it was asked to stop at once. A collective."""
        ends = self._agree(self.clock.is_over() and not self.stop_monitor.reason)
        if ends and self.runtime.is_main:
            self.observer.post_progress(describe_time(self.config.train.max_minutes or 0.0), keep=True)
        return ends

    def _run_epoch(self) -> bool:
        """Train the rest of the current epoch; True if the run ends here, or stops because it was asked to."""
        train, epoch = self.config.train, self.state.epoch
        # No batch beyond the last step is loaded, so that the loader's processes are free for the evaluation.
        left = self.total_steps - self.state.global_step
        steps = islice(self.loader.epoch(epoch, self.state.step), left)
        for groups in self.observer.time_waits(feed(steps, self.runtime.device)):
            now = self.state.global_step
            rates = set_learning_rates(
                self.backend.optimizer, lr_factor(self.config.optim, epoch, now, self.total_steps)
            )
            self._start_step(groups, epoch, rates["main"])
            done = self.state.global_step
            stop = self._read_results(keep=int(self.engine.delays))
            evaluate = is_due(self.state, train.eval_epochs, self.total_steps)
            regular = bool(train.checkpoint_steps) and done % (train.checkpoint_steps or 1) == 0
            save = self.stop_monitor.wants_checkpoint() or regular
            if stop or evaluate or save or done % train.log_steps == 0 or done == self.total_steps:
                stop = self._read_results() or stop
            if train.drift_steps and done % train.drift_steps == 0:
                check_drift(self.model, self.runtime, done, divided=train.zero_stage == 3)
            stop = stop and done < self.total_steps
            if stop and self._is_out_of_time():
                stop, evaluate, self.time_is_up = False, True, True
            evaluate = evaluate and not stop
            if evaluate or stop or done % train.log_steps == 0:
                if self.tasks:
                    self.history = self.tasks.merge_new_results(self.history, done)
                self.observer.log(self.state, epoch, rates, self.history)
            with self.observer.pause(), self.hang.pause():
                if stop:
                    self._save({STOPPED: self.stop_monitor.reason or TERMINATED})
                elif evaluate:
                    self._evaluate_and_save()
                elif save:
                    self._save()
            if stop or self.time_is_up or (evaluate and self._is_out_of_patience()):
                return True
        return False

    def _start_step(self, groups: list[Batch], epoch: int, lr: float) -> None:
        """Run a step; its result is read later (`_read_results`)."""
        now = self.state.global_step
        stop = self.stop_monitor.should_stop(now) or self.clock.is_over()
        run = self.engine.start_step if self.engine.delays else self.engine.train_step
        self.unread.append(StartedStep(run(groups, now, stop), groups, now, epoch, lr))
        self.hang.rearm()
        self._advance()

    def _read_results(self, keep: int = 0) -> bool:
        """Take the results of all steps but the last `keep`; whether one of them asks to stop. A collective."""
        stop = False
        while len(self.unread) > keep:
            step = self.unread.popleft()
            result = step.result if isinstance(step.result, StepResult) else step.result.read()
            self.nonfinite.check(result, step.groups, step.number)
            self._count(result.applied)
            self.observer.step(result, step.epoch, step.number + 1, step.lr)
            stop = stop or result.stop
        return stop

    def _advance(self) -> None:
        ended = self.state.step + 1 == self.loader.steps_per_epoch
        self.state = replace(
            self.state,
            epoch=self.state.epoch + ended,
            step=0 if ended else self.state.step + 1,
            global_step=self.state.global_step + 1,
        )

    def _count(self, applied: bool) -> None:
        self.state = replace(self.state, optimizer_step=self.state.optimizer_step + applied)
        if applied and self.average:
            self.average.update(self.model, self.state.optimizer_step)

    def _evaluate_and_save(self) -> None:
        """Save a checkpoint with its AP, or one that a task will evaluate."""
        if self.tasks:
            self.tasks.note_submitted(self.history, self.state.global_step)
        entry = self._evaluate()
        if entry:
            self.history = (*self.history, entry)
            self.observer.show_evaluation(self.history)
        self._save(entry=entry, validate=self.evaluation is None)

    def _evaluate(self) -> Entry | None:
        """On rank 0 the COCO numbers of the weights; None if a task evaluates. A collective."""
        if self.evaluation is None:
            return None
        eager = torch.compiler.set_stance("force_eager") if self.config.train.compile else nullcontext()
        torch.set_float32_matmul_precision("highest")  # as `jobs.evaluate`
        try:
            with eager:
                model = self.average.model if self.average else self.backend.whole_model()
                return self.evaluation.run(model, self.state, self.history, self._place_of_verdict)
        finally:
            torch.set_float32_matmul_precision(self.config.train.matmul_precision)

    def _place_of_verdict(self, history: History) -> Place | None:
        """Where the verdict on the newest evaluation goes; None if it is not the run's last."""
        train = self.config.train
        last = is_last(self.state, train) or self.time_is_up or is_out_of_patience(history, train.patience)
        return replace(self.place, step=self.state.global_step) if last else None

    def _save(self, metrics: dict[str, Any] | None = None, entry: Entry | None = None, validate: bool = False) -> None:
        self.observer.flush()
        optimizer, weights = self.backend.optimizer_state(), self.backend.whole_model().state_dict()
        if optimizer.loss_scale:
            self.state = replace(self.state, loss_scale=asdict(optimizer.loss_scale))
        average = self.average.model.state_dict() if self.average else None
        speed = {"perf/images_per_s": self.observer.images_per_s}
        self.saver.save(self.state, weights, optimizer.moments, average, {**speed, **(metrics or {})}, entry, validate)

    def _initial_state(self) -> TrainState:
        index = self.loader.index
        return TrainState(dump(self.config), index.categories, index.digest, 0, 0, 0, 0)

    def _load_checkpoint(self, loaded: Checkpoint) -> TrainState:
        """Load the weights into the model; returns the state to continue from."""
        if loaded.state.data_digest != self.loader.index.digest:
            raise CheckpointError(
                f"the checkpoint was trained on other shards than data.train={self.config.data.train} (the digest "
                "differs); give the same data.train, or start a new run with name="
            )
        checkpoint.restore_weights(self.model, loaded.weights)
        log.info("resumed at epoch %d, step %d", loaded.state.epoch, loaded.state.step)
        return replace(loaded.state, config=dump(self.config))
