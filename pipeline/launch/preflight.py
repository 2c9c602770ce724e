"""All checks of a run that need no Ray: paths, data, name, weights, disk, MLflow. Every fault is an InputError.

Paths are resolved against the driver's current folder, because workers run in another one.
"""

import os
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.config.base import map_locations
from pipeline.csrc.kernels import requested_kernels
from pipeline.data.balance import epoch_length, read_factors
from pipeline.data.cache import check_cache
from pipeline.data.index import ShardIndex, check_shards, load_index
from pipeline.data.plan import steps_per_epoch
from pipeline.errors import ConfigError, ResourceError, RunError
from pipeline.evaluation.backends.select import load_backend
from pipeline.files import storage
from pipeline.launch.ray_internals import UPLOADED_FOLDER
from pipeline.launch.resume_check import Resume, check_data_of, check_name, recorded_config
from pipeline.launch.sizing.auto import choose_micro_batch, count_classes, with_recorded
from pipeline.runs.record import RunRecord
from pipeline.tracking.run import check_experiment
from pipeline.tracking.store import TrackingStore, choose_store, resolve_uri

GIB = 2**30


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, and the size of a checkpoint."""

    parameters: int
    trained: int  # parameters that are trained
    checkpoint_bytes: int  # of one checkpoint: weights, their average if there is one, two moments


@dataclass(frozen=True)
class CheckedRun:
    """A run that has passed all checks."""

    config: Config  # paths absolute, `tracking.uri` that of `store`
    train: ShardIndex
    val: ShardIndex
    previous: RunRecord | None  # the run that is continued
    store: TrackingStore
    size: ModelSize


def check_run(config: Config, resume: Resume = "no") -> CheckedRun:
    """Check everything that needs no Ray, cheap checks first; nothing is written.

    Raises:
        InputError: the run cannot start with this input.
    """
    config = make_paths_absolute(config)
    check_storage(config.storage)
    load_backend(config.evaluation.backend)
    requested_kernels()
    config = with_recorded(config, recorded_config(config, resume))
    train, val = check_data(config)
    config = choose_micro_batch(count_classes(config, train), val)
    previous = check_name(config, resume)
    continues = previous is not None and check_data_of(previous, config, train, val)
    size = check_start(config, new=not continues)
    store = check_tracking(config, previous)
    return CheckedRun(with_store(config, store), train, val, previous, store, size)


def check_start(config: Config, new: bool) -> ModelSize:
    """Check the weights that a run starts from, and the disk space for its first checkpoint.

    Args:
        config: paths absolute.
        new: whether the run has no checkpoint to start from.

    Raises:
        ConfigError, CheckpointError: `model.init_from` or `model.backbone.weights` cannot be read or do not fit.
        ResourceError: too little disk space.
    """
    size = count_parameters(config, load=new)
    check_disk(config.storage, size.checkpoint_bytes)
    return size


def count_parameters(config: Config, load: bool = False) -> ModelSize:
    """The size of the model.

    Args:
        config: with a number of classes.
        load: read the initial weights as well, so that a fault in them is found.

    Raises:
        ConfigError, CheckpointError: see `check_start`.
    """
    import torch  # not at the top: earlier checks should fail fast

    from pipeline.model.build import build_model, check_weights

    reads = load and (config.model.init_from or config.model.backbone.weights != "none")
    with nullcontext() if reads else torch.device("meta"):
        model = check_weights(config.model) if reads else build_model(config.model, load_backbone=False)
    state = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(count for count, trains in counts if trains)
    need = state * (2 if config.train.ema_decay else 1) + 8 * trained  # two moments in fp32
    return ModelSize(sum(count for count, _ in counts), trained, need)


def check_disk(folder: str, need: int) -> None:
    """Refuse a `storage` without space for one checkpoint of `need` bytes; a URL is not checked.

    A checkpoint is first written into the temporary folder, which is checked if the workers run on this machine.

    Raises:
        ResourceError: with both numbers.
    """
    places = [] if storage.is_url(folder) else [("storage", Path(folder))]
    if not os.environ.get("RAY_ADDRESS"):
        places.append(("TMPDIR", Path(tempfile.gettempdir())))
    needs: dict[int, int] = {}
    for key, path in places:
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        if not there.is_dir():
            raise ResourceError(f"{key}={path}: {there} is a file; give a folder")
        disk = there.stat().st_dev
        needs[disk] = needs.get(disk, 0) + need
        free = shutil.disk_usage(there).free
        if free < needs[disk]:
            raise ResourceError(
                f"a checkpoint needs {needs[disk] / GIB:.2f} GiB on the disk of {key}={path}, which has "
                f"{free / GIB:.2f} GiB free; free space there or set {key} to a folder on another disk"
            )


def make_paths_absolute(config: Config) -> Config:
    """The config with every local path made absolute against the current folder; URLs are unchanged."""
    uri = config.tracking.uri and resolve_uri(config.tracking.uri)
    tracking = config.tracking.model_copy(update={"uri": uri})
    return map_locations(config, storage.make_absolute).model_copy(update={"tracking": tracking})


def check_storage(folder: str) -> None:
    """Refuse a storage that Ray removes after the job. Raises RunError."""
    if UPLOADED_FOLDER in folder:
        raise RunError(
            f"storage {folder} is inside Ray's copy of the submitted folder, which other nodes do not see and Ray "
            "removes: set storage to an absolute path or a URL"
        )


def check_data(config: Config) -> tuple[ShardIndex, ShardIndex]:
    """Load both indexes, check that their shards exist, and compare them with the model and the batch.

    Raises:
        ShardError: an index or a shard is missing or damaged.
        ConfigError: the data do not fit the settings.
    """
    for split in ("train", "val"):
        if not getattr(config.data, split):
            raise ConfigError(f"data.{split} is empty: give a folder written by `python -m jobs.shard build`")
    train_index, val_index = load_index(config.data.train), load_index(config.data.val)
    classes = count_classes(config, train_index).model.classes
    if config.data.labels == "contiguous" and len(train_index.categories) != classes:
        raise ConfigError(
            f"{config.data.train} has {len(train_index.categories)} categories but model.num_classes is "
            f"{classes}; set model.num_classes={len(train_index.categories)}"
        )
    if config.data.labels == "raw":
        beyond = [str(k) for k in train_index.category_ids if k >= classes]
        if beyond:
            raise ConfigError(
                f"{config.data.train} has category ids {', '.join(beyond[:5])}, but the raw layout has logits for ids "
                f"below model.num_classes={classes}; set data.labels=contiguous"
            )
    if train_index.categories != val_index.categories:
        raise ConfigError("data.train and data.val have different categories; shard both from files with the same ones")
    samples = len(train_index.samples)
    if config.data.balance and samples < config.train.global_batch:  # else it is enough without repeats
        samples = epoch_length(read_factors(config.data))
    steps_per_epoch(samples, config.train.global_batch, config.data.tail)
    check_cache(train_index, "data.train", config.data, max(config.data.window, config.train.global_batch))
    check_cache(val_index, "data.val", config.data, 1)
    check_shards(train_index)
    check_shards(val_index)
    return train_index, val_index


def with_store(config: Config, store: TrackingStore) -> Config:
    """The config with the address of `store` as its `tracking.uri`."""
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": store.uri})})


def check_tracking(config: Config, previous: RunRecord | None = None) -> TrackingStore:
    """The MLflow store to use. If it answers, it is checked that `tracking.experiment` can be used.

    Args:
        config: paths absolute.
        previous: the run that is continued; its store takes precedence over the environment's.

    Raises:
        InputError: no valid address, a login in it, a deleted experiment, or a store that cannot be used as it is.
    """
    store = choose_store(setting=config.tracking.uri, record=previous)
    check_experiment(store, config.tracking.experiment)
    return store
