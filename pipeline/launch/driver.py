"""One training run from its start to its end: checks, Ray, TorchTrainer, record. Jobs and Tune trials call `train`.

Wrong input is found before a worker starts (see `preflight` and `cluster`) and raised as an InputError. SIGTERM or
Ctrl-C stops the run after a checkpoint (PreemptedError, KeyboardInterrupt); a second Ctrl-C ends it at once. A run has
one driver at a time (`run_lock`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    UserCallback,
)
from ray.train import ScalingConfig as RayScaling
from ray.train.torch import TorchTrainer

from pipeline.config import Config, ScalingConfig, dump, dump_yaml, from_record
from pipeline.engine.cpu_tuning import process_environment
from pipeline.engine.precision import check_precision
from pipeline.errors import PreemptedError, after_start
from pipeline.evaluation.task import validation_config
from pipeline.files import storage
from pipeline.launch.cluster import check_resources, resolve_gpu, resolve_where, start_ray
from pipeline.launch.interrupt import run_interruptible
from pipeline.launch.nodes import prepare_nodes
from pipeline.launch.preflight import CheckedRun, check_run, make_paths_absolute
from pipeline.launch.recording import RecordCallback
from pipeline.launch.restarts import RestartCallback
from pipeline.launch.resume_check import Resume, has_changed
from pipeline.launch.run_end import finish, record_failure, reload_record
from pipeline.launch.run_lock import HeldRun, hold_run, wait_for_owner
from pipeline.launch.run_warnings import run_warnings
from pipeline.launch.sizing.estimate import describe_run
from pipeline.launch.snapshot import repair
from pipeline.launch.ticker import show_progress
from pipeline.launch.worker_output import filter_output
from pipeline.logs import get_logger
from pipeline.runs.record import RunRecord, with_best, write_run
from pipeline.tracking.client import RESTART_SECONDS
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.run import start_run
from pipeline.training.ending import Clock
from pipeline.training.saving import SCORE, write_manifest
from pipeline.training.stopping import InterruptibleTorch, start_control_channel
from pipeline.training.worker import train_worker

CONTINUE = "the same command continues (jobs.train with --resume=auto)"

log = get_logger("driver")


def train(
    config: Config,
    *,
    resume: Resume = "no",
    checked: CheckedRun | None = None,
    parent_run_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
    patience: float = 0.0,
) -> RunRecord:
    """Run training to its end on the Ray cluster at hand (RAY_ADDRESS, a job's, or a local one).

    Args:
        config: the whole run; relative paths mean this process's folder.
        resume: `no` refuses a run name that exists, `must` refuses one that does not, `auto` accepts both.
        checked: result of `preflight.check_run`, if the caller has run it before this module was loaded.
        parent_run_id: MLflow run of the sweep that this run belongs to.
        callbacks: further Ray Train callbacks.
        patience: seconds to wait for the end of another process that runs this run.

    Raises:
        InputError: the run cannot start with this input, or another process runs it.
        LostRunError: another process has taken over the run.
        PreemptedError: the run was asked to stop; `resume="auto"` continues it. Also if SIGTERM came after its last
            step: the run has finished, but the caller must not begin with anything else.
        PipelineError: training failed; `run.json` holds the last checkpoint.
        KeyboardInterrupt: Ctrl-C; as after PreemptedError, the run can be continued.
    """
    config = make_paths_absolute(config)
    folder = storage.join(config.storage, config.name)
    if patience:
        wait_for_owner(folder, patience)
    checked = checked or check_run(config, resume)
    with hold_run(folder, resume) as held:
        if has_changed(folder, checked.previous):  # another driver was at work between the checks and the lock
            checked = check_run(config, resume)
        return _train(checked, held, parent_run_id, callbacks)


def _train(
    checked: CheckedRun, held: HeldRun, parent_run_id: str | None, callbacks: Sequence[UserCallback]
) -> RunRecord:
    """See `train`; this process holds the run."""
    config, previous = checked.config, checked.previous
    if parent_run_id is None:  # the trials of a sweep would repeat it
        log.info("run %s: %s", config.name, describe_run(checked))
    for warning in run_warnings(checked):
        log.warning("%s", warning)
    start_ray()
    config = config.model_copy(update={"scaling": resolve_gpu(config.scaling)})
    if not config.scaling.use_gpu:
        check_precision(config.train.precision, torch.device("cpu"))
    check_resources(config.scaling)
    if config.ends_by_itself:  # the AP decides what comes next
        inline = config.evaluation.model_copy(update={"where": "inline"})
        config = config.model_copy(update={"evaluation": inline})
    config = config.model_copy(update={"evaluation": resolve_where(config.evaluation, config.scaling)})
    folder = storage.join(config.storage, config.name)
    prepare_nodes(config.scaling, config.storage, config.data)
    held.check()
    stored = repair(folder, stored_before=previous is not None and previous.last is not None)
    run_id = start_run(
        config.tracking,
        config,
        config.name,
        resume_run_id=previous.run_id if previous else None,
        tags={"data_digest": checked.train.digest},
        parent_run_id=parent_run_id,
        knob=checked.store.knob,
        data={"train": checked.train, "val": checked.val},
    )
    if run_id is None and previous:  # MLflow does not answer; the old run's id is kept for when it does
        run_id = previous.run_id
    digests = {"train": checked.train.digest, "val": checked.val.digest}
    record = RunRecord(config.name, folder, dump(config), run_id, data=digests)
    if previous:
        last = storage.join(folder, stored[-1].name) if stored else None
        record = replace(record, last=last, metrics=previous.metrics)
    with after_start(), record_failure(record), held.checked():
        write_run(record)
        if previous is None:
            Clock(folder, config.train.max_minutes).reset()
        with RunLogger(config.tracking.uri, run_id) as logger:
            logger.text(dump_yaml(config), "config.yaml")
        record, signals = _fit(config, record, callbacks, held)
    stop_after_end(record, signals)
    return with_best(record)


def _fit(
    config: Config, record: RunRecord, callbacks: Sequence[UserCallback], held: HeldRun
) -> tuple[RunRecord, list[str]]:
    """The finished run, and the names of signals that came too late to stop it."""
    signals: list[str] = []
    control = start_control_channel(record.folder)

    def request_stop(signal: str) -> None:
        signals.append(signal)
        control.request_stop.remote(signal)

    payload = {"config": dump(config), "tracking_uri": config.tracking.uri, "run_id": record.run_id, "control": control}
    restarts = RestartCallback(control, config.scaling.max_failures)
    trainer = _trainer(config, payload, record, [RecordCallback(record, control), restarts, *callbacks])
    with filter_output() as output, show_progress(control):
        try:
            result = run_interruptible(trainer.fit, request_stop, held.check)
        finally:  # a run that succeeded after a restart has hidden tracebacks, too
            if output.hid_faults and (path := output.write(record.folder)):
                log.info("the output of all workers, with tracebacks: %s", path)
    held.check()
    _log_checkpoint_list(result, record)
    record = reload_record(record)
    if not record.stopped:
        return finish(record, "FINISHED"), signals
    if "SIGINT" in signals:
        raise KeyboardInterrupt
    raise PreemptedError(
        f"run {config.name} stopped early ({record.stopped}) with the checkpoint {record.last}; {CONTINUE}"
    )


def stop_after_end(record: RunRecord, signals: Sequence[str]) -> None:
    """End the caller of a finished run that signals asked to stop: they came after its last step.

    Raises:
        KeyboardInterrupt: Ctrl-C was among them.
        PreemptedError: only SIGTERM came.
    """
    if "SIGINT" in signals:
        raise KeyboardInterrupt
    if signals:
        raise PreemptedError(f"run {record.name} has finished, and {signals[0]} came at its end; {CONTINUE}")


def _log_checkpoint_list(result: Result, record: RunRecord) -> None:
    """Log the final list of checkpoints in MLflow, because evaluation tasks end after the last report."""
    with RunLogger(from_record(record.config, record.folder).tracking.uri, record.run_id) as logger:
        known = [(checkpoint.path, metrics) for checkpoint, metrics in result.best_checkpoints or ()]
        write_manifest(logger, record.folder, known)
        logger.flush(RESTART_SECONDS)


def _trainer(config: Config, payload: dict[str, Any], record: RunRecord, callbacks: list[UserCallback]) -> TorchTrainer:
    scaling, path = config.scaling, storage.ray_storage(config.storage)
    return TorchTrainer(
        train_worker,
        train_loop_config=payload,
        torch_config=InterruptibleTorch(),
        validation_config=validation_config(config, record.folder, record.run_id, payload["control"]),
        scaling_config=RayScaling(
            num_workers=(scaling.min_required, scaling.num_workers) if scaling.min_workers else scaling.num_workers,
            use_gpu=bool(scaling.use_gpu),
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=path[0],
            storage_filesystem=path[1],
            failure_config=failure_limits(config.scaling),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.train.keep_checkpoints,
                checkpoint_score_attribute=SCORE,
                checkpoint_score_order="max",
            ),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": process_environment(config.train, bool(scaling.use_gpu))},
            logging_config=LoggingConfig("WARNING"),  # below that Ray Train prints whole reports
        ),
    )


def failure_limits(scaling: ScalingConfig) -> FailureConfig:
    """Limits on how often workers may fail, and how often Ray may fail to find resources for them.

    If resources are missing for a minute (`cluster.TRAIN_SETTINGS`), that is a failure of Ray's controller, which
    without a limit would retry endlessly. `wait_minutes` applies here too, because replacing a lost node takes as long.
    """
    tries = max(3, math.ceil(scaling.wait_minutes))
    return FailureConfig(max_failures=scaling.max_failures, controller_failure_limit=tries)
