"""The one training run that `jobs.train`, `jobs.demo` and every Tune trial start: checks, Ray, TorchTrainer, record.

Everything that can be wrong with the input is found here, before a worker starts, and raised as an InputError. Paths
are resolved against the driver's folder, because Ray changes the workers' one. SIGTERM or Ctrl-C lets the run leave
with a checkpoint (`PreemptedError`, KeyboardInterrupt); a second Ctrl-C ends it at once.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train import ScalingConfig as RayScaling
from ray.train.torch import TorchTrainer

from pipeline import storage
from pipeline.cluster import check_resources, resolve_gpu, resolve_where, start_ray
from pipeline.config import Config, ScalingConfig, changed_for_resume, dump, dump_yaml, from_dict
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.plan import steps_per_epoch
from pipeline.errors import ConfigError, PipelineError, PreemptedError, RunError
from pipeline.interrupt import run_interruptible
from pipeline.mlflow_client import resolve_uri
from pipeline.model.build import check_init_from
from pipeline.nodes import prepare_nodes
from pipeline.runs import IMPORTED, RunRecord, read_run, run_exists, write_run
from pipeline.runtime import KEEP_FREED_MEMORY, get_logger
from pipeline.snapshot import FILE as SNAPSHOT
from pipeline.snapshot import Stored, repair
from pipeline.tracking import RunLogger, finish_run, start_run
from pipeline.training.batching import recipe_warning
from pipeline.training.recording import RecordCallback, with_scores
from pipeline.training.saving import SCORE, report_metrics, write_manifest
from pipeline.training.stopping import InterruptibleTorch, hang_bell
from pipeline.training.ticker import showing
from pipeline.training.validating import validation_config
from pipeline.worker import train_worker

log = get_logger("driver")
Resume = Literal["no", "must", "auto"]
UPLOADED = "/runtime_resources/working_dir_files/"  # where Ray unpacks the working folder of a submitted job


def train(
    config: Config, *, resume: Resume = "no", parent_run_id: str | None = None, callbacks: Sequence[UserCallback] = ()
) -> RunRecord:
    """Run training to its end on the Ray cluster at hand (RAY_ADDRESS, a job's, or a local one).

    Args:
        config: the whole run; relative paths mean this process's folder.
        resume: `no` refuses a run name that exists, `must` refuses one that does not, `auto` takes either.
        parent_run_id: MLflow run that this one becomes a child of (a sweep).
        callbacks: further Ray Train callbacks.

    Raises:
        InputError: the run cannot start as asked.
        PreemptedError: the run was told to leave; it goes on with `resume="auto"`.
        PipelineError: training failed; `run.json` says where it stands.
        KeyboardInterrupt: Ctrl-C; as after PreemptedError, the run can go on.
    """
    config = absolute(config)
    if UPLOADED in config.storage:
        raise RunError(
            f"storage {config.storage} lies in Ray's copy of the submitted folder, which other nodes do not see and "
            "Ray removes: give an absolute path or a URL"
        )
    check_data(config)
    if warning := recipe_warning(config.train, config.published):
        log.warning("%s", warning)
    previous = _check_name(config, resume)
    if previous is None:
        check_init_from(config.model)
    start_ray()
    config = config.model_copy(update={"scaling": resolve_gpu(config.scaling)})
    check_resources(config.scaling)
    config = config.model_copy(update={"evaluation": resolve_where(config.evaluation, config.scaling)})
    folder = storage.join(config.storage, config.name)
    stored = repair(folder) if previous else []
    prepare_nodes(config.scaling, config.storage)
    run_id = start_run(
        config.tracking,
        config,
        config.name,
        resume_run_id=previous.run_id if previous else None,
        tags={"data_digest": load_index(config.data.train).digest},
        parent_run_id=parent_run_id,
    )
    logger = RunLogger(config.tracking.uri, run_id)
    logger.text(dump_yaml(config), "config.yaml")
    logger.close()
    record = RunRecord(config.name, folder, dump(config), run_id)
    if previous:
        record = existing(replace(record, best=previous.best, metrics=previous.metrics), stored)
    write_run(record)
    return _fit(config, record, callbacks)


def _fit(config: Config, record: RunRecord, callbacks: Sequence[UserCallback]) -> RunRecord:
    bell = hang_bell()
    signals: list[str] = []

    def ask(signal: str) -> None:
        signals.append(signal)
        bell.ring.remote(signal)

    payload = {"config": dump(config), "tracking_uri": config.tracking.uri, "run_id": record.run_id, "bell": bell}
    trainer = _trainer(config, payload, record, [RecordCallback(record.folder), *callbacks])
    try:
        with showing(bell):
            result = run_interruptible(trainer.fit, ask)
    except TrainingFailedError as error:
        _finish(record, "FAILED")
        raise _cause(error) from error
    except (KeyboardInterrupt, SystemExit):  # a second Ctrl-C; Ray's own answer to one is sys.exit
        _finish(record, "KILLED")
        raise KeyboardInterrupt from None
    record = _take_over(result, record)
    if not record.stopped:
        return _finish(record, "FINISHED")
    if "SIGINT" in signals:
        _finish(record, "KILLED")
        raise KeyboardInterrupt
    _finish(record, "PREEMPTED")
    raise PreemptedError(
        f"run {config.name} left early ({record.stopped}) with the checkpoint {record.last}; "
        "the same command with --resume=auto goes on from it"
    )


def _take_over(result: Result, record: RunRecord) -> RunRecord:
    """Record and MLflow brought to what Ray knows at the end: evaluation tasks end after the last report."""
    known = [(checkpoint.path, metrics) for checkpoint, metrics in result.best_checkpoints or ()]
    logger = RunLogger(from_dict(record.config).tracking.uri, record.run_id)
    write_manifest(logger, record.folder, known)
    logger.close()
    record = with_scores(read_run(record.folder), {path.rpartition("/")[2]: metrics for path, metrics in known})
    write_run(record)
    return record


def _trainer(config: Config, payload: dict[str, Any], record: RunRecord, callbacks: list[UserCallback]) -> TorchTrainer:
    scaling, path = config.scaling, storage.ray_storage(config.storage)
    return TorchTrainer(
        train_worker,
        train_loop_config=payload,
        torch_config=InterruptibleTorch(),
        validation_config=validation_config(config, record.folder, record.run_id, payload["bell"]),
        scaling_config=RayScaling(
            num_workers=(scaling.least, scaling.num_workers) if scaling.min_workers else scaling.num_workers,
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
            worker_runtime_env={"env_vars": {} if scaling.use_gpu else KEEP_FREED_MEMORY},
            logging_config=LoggingConfig("WARNING"),  # of Ray Train itself: it prints whole reports
        ),
    )


def failure_limits(scaling: ScalingConfig) -> FailureConfig:
    """How often workers may fail, and how often Ray may not find places for them.

    Places that do not come are a failure of Ray's controller, after a minute (`cluster.TRAIN_SETTINGS`); without a
    limit it tries for ever. A node that was lost may take as long to be replaced as one to come at the start.
    """
    tries = max(3, math.ceil(scaling.wait_minutes))
    return FailureConfig(max_failures=scaling.max_failures, controller_failure_limit=tries)


def existing(record: RunRecord, stored: Sequence[Stored]) -> RunRecord:
    """The record with its last and best checkpoint among `stored`, which is all there is, newest last."""
    record = replace(record, last=storage.join(record.folder, stored[-1].name) if stored else None)
    scores = {each.name: report_metrics(each.state) for each in stored}
    fresh = with_scores(replace(record, best=None, metrics={}), scores)
    return record if record.best == fresh.best else fresh  # it knows more of the one it has


def absolute(config: Config) -> Config:
    """The config with every local path made absolute against the current folder; URLs stay."""
    tree = dump(config)
    tree["storage"] = storage.absolute(tree["storage"])
    for split in ("train", "val"):
        tree["data"][split] = storage.absolute(tree["data"][split])
    tree["data"]["cache_dir"] = storage.absolute(tree["data"]["cache_dir"])
    tree["tracking"]["uri"] = resolve_uri(tree["tracking"]["uri"])
    tree["model"]["init_from"] = storage.absolute(tree["model"]["init_from"])
    weights = tree["model"]["backbone"]["weights"]
    if weights not in ("imagenet", "none"):
        tree["model"]["backbone"]["weights"] = storage.absolute(weights)
    return from_dict(tree)


def check_data(config: Config) -> tuple[ShardIndex, ShardIndex]:
    """Load both indexes and compare them with the model and the batch. Raises ShardError, ConfigError."""
    for split in ("train", "val"):
        if not getattr(config.data, split):
            raise ConfigError(f"data.{split} is empty: give a folder written by `python -m jobs.shard build`")
    train_index, val_index = load_index(config.data.train), load_index(config.data.val)
    if config.data.labels == "contiguous" and len(train_index.categories) != config.model.num_classes:
        raise ConfigError(
            f"{config.data.train} has {len(train_index.categories)} categories but model.num_classes is "
            f"{config.model.num_classes}; set model.num_classes={len(train_index.categories)}"
        )
    if config.data.labels == "raw":
        beyond = [str(k) for k in train_index.category_ids if k >= config.model.num_classes]
        if beyond:
            raise ConfigError(
                f"{config.data.train} has category ids {', '.join(beyond[:5])}, but the raw layout has logits for ids "
                f"below model.num_classes={config.model.num_classes}; set data.labels=contiguous"
            )
    if train_index.categories != val_index.categories:
        raise ConfigError("data.train and data.val have different categories; shard both from files with the same ones")
    steps_per_epoch(len(train_index.samples), config.train.global_batch, config.data.tail)
    return train_index, val_index


def _check_name(config: Config, resume: Resume) -> RunRecord | None:
    """The previous record of this run name, if it may be continued. Raises RunError."""
    folder = storage.join(config.storage, config.name)
    try:
        taken = run_exists(folder)
    except OSError as error:
        raise RunError(f"cannot read storage {config.storage}: {error}; mend its address or your access") from None
    if not taken:
        if storage.exists(storage.join(folder, SNAPSHOT)):  # Ray would go on with it, whatever it is of
            raise RunError(f"{folder} has Ray's list of checkpoints but no run.json; remove it or choose another name=")
        if resume == "must":
            raise RunError(f"--resume: there is no run {folder}; drop --resume to start it, or give its name=")
        return None
    if resume == "no":
        raise RunError(f"run {folder} exists already; continue it with --resume or choose another name=")
    record = read_run(folder)
    if record.status == IMPORTED:
        raise RunError(
            f"run {folder} holds imported weights, not training; start a new name= with model.init_from={folder}"
        )
    changed = changed_for_resume(from_dict(record.config, f"{folder}/run.json"), config)
    if changed:
        listing = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
        raise RunError(f"run {folder} cannot be continued with another {listing}; give the old values or a new name=")
    return record


def _finish(record: RunRecord, status: str) -> RunRecord:
    record = replace(read_run(record.folder), status=status)
    try:
        write_run(record)
    except OSError as error:  # the disk is full, perhaps: that must not hide why the run ended
        log.warning("cannot write into the record of run %s that it is %s: %s", record.folder, status, error)
    finish_run(from_dict(record.config).tracking.uri, record.run_id, status)
    return record


def _cause(error: TrainingFailedError) -> PipelineError:
    """The worker's own PipelineError, if one is behind a failed run."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        inner = getattr(failure, "cause", failure)
        while inner is not None:
            if isinstance(inner, PipelineError):
                return inner
            inner = inner.__cause__
    return PipelineError(f"training failed: {error}")
