"""Checks of a run's name: whether it is free, and whether the run of that name can continue with this config and data.

Nothing is written, so a refused resume changes neither the record nor the checkpoints nor MLflow. Every refusal is a
RunError or a CheckpointError.
"""

from typing import Literal

from pipeline.config import Config, changed_for_resume, from_record
from pipeline.data.index import ShardIndex, load_index
from pipeline.errors import CheckpointError, RunError, ShardError
from pipeline.files import storage
from pipeline.files.folder_lock import Owner, in_use, read_owner
from pipeline.launch.sizing.steps import length_of
from pipeline.logs import get_logger
from pipeline.runs.record import (
    CHECKPOINT_LIST,
    CHECKPOINT_NAME,
    FILE,
    IMPORTED,
    RunRecord,
    read_record,
    read_run,
    run_exists,
)

Resume = Literal["no", "must", "auto"]
ENDED = ("FAILED", "KILLED")  # statuses of a run that ended before its last step, by a fault or by the user

log = get_logger("resume")


def check_name(config: Config, resume: Resume) -> RunRecord | None:
    """The record of the run of this name if it is to be continued; None if a new run may use the name.

    A run that ended before its first checkpoint does not keep its name: a new start replaces its record.

    Raises:
        RunError: the name is in use, there is no run to continue, or it cannot continue with these settings.
    """
    folder = storage.join(config.storage, config.name)
    if not _is_taken(config, folder):
        if resume == "must":
            raise RunError(f"--resume: there is no run {folder}; drop --resume to start it, or give its name=")
        return None
    record = read_run(folder)
    free = _has_ended_without_checkpoint(record)
    if resume == "no":
        if not free:
            if record.status == "RUNNING" and (owner := _read_owner(folder)) and owner.is_alive:
                raise RunError(in_use(folder, owner))
            raise RunError(
                f"run {folder} exists already ({record.status}); continue it with --resume or choose another name="
            )
        log.info("run %s is %s without a checkpoint: this start replaces its record", folder, record.status)
        return None
    if record.status == IMPORTED:
        raise RunError(
            f"run {folder} holds imported weights, not training; start a new name= with model.init_from={folder}"
        )
    changed = changed_for_resume(from_record(record.config, f"{folder}/{FILE}"), config)
    if changed and free and resume == "auto":
        log.info("run %s is %s without a checkpoint: this start replaces its record", folder, record.status)
        return None
    if changed:
        listing = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
        raise RunError(f"run {folder} cannot be continued: {listing}; give the old values or a new name=")
    return record


def has_changed(folder: str, previous: RunRecord | None) -> bool:
    """Whether the run was written since `check_name` looked at it.

    Args:
        folder: of the run.
        previous: what `check_name` returned.

    Raises:
        RunError: the storage does not answer.
    """
    try:
        record = read_record(folder) if run_exists(folder) else None
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error}; check its address and your access") from None
    if previous is None:
        return record is not None and not _has_ended_without_checkpoint(record)
    return record is None or _state_of(record) != _state_of(previous)


def _state_of(record: RunRecord) -> str:
    """What a driver changes; as text, in which NaN equals NaN."""
    return repr((record.status, record.last, record.run_id, record.stopped, record.data, record.config))


def recorded_config(config: Config, resume: Resume) -> Config | None:
    """The config of the run that this start may continue; None if it starts a new one.

    Raises:
        RunError: the record, or the storage, cannot be read.
    """
    folder = storage.join(config.storage, config.name)
    if resume == "no" or not _is_taken(config, folder):
        return None
    record = read_run(folder)
    if record.status == IMPORTED or (resume == "auto" and _has_ended_without_checkpoint(record)):
        return None
    return from_record(record.config, f"{folder}/{FILE}")


def check_data_of(record: RunRecord, config: Config, train: ShardIndex, val: ShardIndex) -> bool:
    """Whether the run of `record` has checkpoints to continue from; if so, its shards must be the same.

    Digests are compared, not paths, because a folder may have moved. A record of version 1 has no digest of `data.val`;
    then the digest of its folder is used, if that still exists.

    Args:
        record: as `check_name` found it.
        config: of this start, paths absolute.
        train: index of its `data.train`.
        val: index of its `data.val`.

    Raises:
        RunError: other shards, or a run that is longer already than these settings make it.
        CheckpointError: the run's checkpoints cannot be used, see `inspect_checkpoints`.
    """
    from pipeline.launch.snapshot import inspect_checkpoints  # not at the top, because it loads torch

    found = inspect_checkpoints(record.folder, record.last is not None)
    other = [each.name for each in found.usable if each.state.data_digest != train.digest]
    if other:
        raise RunError(
            f"run {record.folder} was trained on other shards than data.train={config.data.train} (the digest in "
            f"{other[-1]} differs); give the same data.train or start a new name="
        )
    before = _digest_of_val(record, config)
    if found.usable and before not in ("", val.digest):
        raise RunError(
            f"run {record.folder} was evaluated on other shards than data.val={config.data.val} (the digest differs), "
            f"and APs of two sets do not compare; give the same data.val, or a new name= with "
            f"model.init_from={record.folder}"
        )
    if found.usable:
        _check_length(record.folder, found.usable[-1].state.global_step, config, train)
    return bool(found.usable)


def _check_length(folder: str, done: int, config: Config, train: ShardIndex) -> None:
    """Refuse to end a run before the step that it has: its record would say that so many steps gave its weights."""
    length, settings = length_of(config, train), config.train
    if done <= length.total:
        return
    limits = f"train.epochs={settings.epochs}" + f", train.max_steps={settings.max_steps}" * bool(settings.max_steps)
    raise RunError(
        f"run {folder} has trained {done} steps already, more than the {length.total} of {limits}; give more, or end "
        f"it where it is with train.epochs={-(-done // length.per_epoch)} train.max_steps={done}"
    )


def _read_owner(folder: str) -> Owner | None:
    try:
        return read_owner(folder)
    except OSError:  # then only its record says that it runs
        return None


def _is_taken(config: Config, folder: str) -> bool:
    try:
        if run_exists(folder):
            return True
        # Ray, or a later resume, would continue from such checkpoints, even if they belong to something else.
        foreign = storage.exists(storage.join(folder, CHECKPOINT_LIST)) or any(
            CHECKPOINT_NAME.fullmatch(name) for name in storage.subfolders(folder)
        )
    except OSError as error:
        raise RunError(f"cannot read storage {config.storage}: {error}; check its address and your access") from None
    if foreign:
        raise RunError(f"{folder} has checkpoints but no {FILE}; remove them or choose another name=")
    return False


def _has_ended_without_checkpoint(record: RunRecord) -> bool:
    if record.status not in ENDED or record.last is not None:
        return False
    from pipeline.launch.snapshot import inspect_checkpoints

    try:
        return not inspect_checkpoints(record.folder, stored_before=False).usable
    except CheckpointError:  # there were some
        return False


def _digest_of_val(record: RunRecord, config: Config) -> str:
    """Digest of the shards that the run was evaluated on; empty, with a warning, if it cannot be found out."""
    if digest := record.data.get("val"):
        return digest
    folder = record.config["data"]["val"]
    if folder == config.data.val:
        return ""
    try:
        return load_index(folder).digest
    except ShardError as error:
        log.warning(
            "the record of run %s has no digest of data.val=%s (%s); it is assumed to be the same set as %s",
            record.folder,
            folder,
            error,
            config.data.val,
        )
        return ""
