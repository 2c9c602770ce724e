"""What can be wrong with a run before Ray starts: its paths, its data, its name. Every fault is an InputError.

Paths are resolved against the driver's folder, because Ray changes the workers' one. Used by `driver.py`, `preview.py`
(`--dry-run`), `jobs.weights` and the sweep.
"""

from typing import Literal

from pipeline import storage
from pipeline.config import Config, changed_for_resume, from_record
from pipeline.config.base import map_locations
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.plan import steps_per_epoch
from pipeline.errors import ConfigError, RunError
from pipeline.mlflow_client import resolve_uri
from pipeline.runs import IMPORTED, RunRecord, read_run, run_exists
from pipeline.snapshot import FILE as SNAPSHOT

Resume = Literal["no", "must", "auto"]
UPLOADED = "/runtime_resources/working_dir_files/"  # where Ray unpacks the working folder of a submitted job


def absolute(config: Config) -> Config:
    """The config with every local path made absolute against the current folder; URLs stay."""
    tracking = config.tracking.model_copy(update={"uri": resolve_uri(config.tracking.uri)})
    return map_locations(config, storage.absolute).model_copy(update={"tracking": tracking})


def check_storage(folder: str) -> None:
    """Refuse a storage that Ray removes after the job. Raises RunError."""
    if UPLOADED in folder:
        raise RunError(
            f"storage {folder} lies in Ray's copy of the submitted folder, which other nodes do not see and Ray "
            "removes: give an absolute path or a URL"
        )


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


def check_name(config: Config, resume: Resume) -> RunRecord | None:
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
    changed = changed_for_resume(from_record(record.config, f"{folder}/run.json"), config)
    if changed:
        listing = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
        raise RunError(f"run {folder} cannot be continued with another {listing}; give the old values or a new name=")
    return record
