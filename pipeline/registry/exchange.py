"""Import of weights of other code bases as a run, and export of a run's weights in the published layout.

An imported run has a checkpoint but was never trained. `jobs.evaluate`, `jobs.predict`, `jobs.register`, `jobs.export`
and `model.init_from` accept it like any other; `--resume` refuses it. Raises CheckpointError, ConfigError and RunError.
"""

import io
from pathlib import Path

import torch

from pipeline import checkpoint
from pipeline.checkpoint import TrainState, load_inference
from pipeline.config import Config, dump
from pipeline.data.coco_categories import COCO_CATEGORIES
from pipeline.data.index import Category, load_index
from pipeline.errors import ConfigError, RunError, storage_error
from pipeline.files import storage
from pipeline.files.atomic import replace_file
from pipeline.model import build_model
from pipeline.model.weights.files import WeightFile
from pipeline.model.weights.init_from import check_finite, load_exactly
from pipeline.model.weights.published import export_official
from pipeline.runs.record import IMPORTED, RunRecord, run_exists, write_run

COCO_LOGITS = 91  # of published weights: one per raw category id, including 0 and the gaps


def class_settings(file: WeightFile, softmax: bool) -> list[str]:
    """The overrides that describe the file's classes; published COCO weights have raw labels.

    Args:
        file: weights with heads named `class_embed`.
        softmax: whether the last logit is "no object".
    """
    heads = [t for key, t in file.tensors.items() if "class_embed." in key and key.endswith("weight")]
    rows = [len(tensor) for tensor in heads if tensor.ndim == 2]
    if not rows:
        return []
    classes = rows[0] - softmax
    raw = ["data.labels=raw"] if classes == COCO_LOGITS and file.layout != "own" else []
    return [f"model.num_classes={classes}", *raw]


def import_weights(file: WeightFile, config: Config) -> RunRecord:
    """Create the run `config.name` under `config.storage` from weights that fit `config.model` exactly.

    Args:
        file: read by `model.weights.files.read_weights`.
        config: paths absolute. The categories are those of `data.val` or `data.train`; without either, COCO's.

    Raises:
        CheckpointError: the weights do not fit, of which the message lists all differences; or are not finite.
        ConfigError: the categories are not known, or their number or ids are not those of the classes.
        RunError: a run of this name exists, or it would not be a local folder.
    """
    folder = storage.join(config.storage, config.name)
    if storage.is_url(folder):
        raise RunError(f"weights are imported into a local folder, not {folder}; import them locally and copy the run")
    if run_exists(folder):
        raise RunError(f"run {folder} exists already; choose another folder")
    path = Path(folder) / "checkpoint"
    if path.exists():
        raise RunError(f"{path} exists already and is not replaced; choose another folder for the run")
    categories, digest = _categories(config)
    check_finite(file.source, file.tensors)
    model = build_model(config.model, load_backbone=False)
    load_exactly(model, file)
    checkpoint.save(path, TrainState(dump(config), categories, digest, 0, 0, 0, 0), model.state_dict(), {})
    record = RunRecord(config.name, folder, dump(config), status=IMPORTED, last=str(path))
    write_run(record)
    return record


def export_weights(folder: Path, out: Path) -> int:
    """Write a checkpoint's weights in the published layout, as `{"model": ...}`; returns the number of keys.

    Raises:
        CheckpointError: the model has no published layout.
        StorageError: the file cannot be written.
    """
    tensors = {key: tensor.clone() for key, tensor in export_official(load_inference(folder).model).items()}
    packed = io.BytesIO()  # torch's own writer ends the process if the disk is full
    torch.save({"model": tensors}, packed)
    try:
        with replace_file(out) as temporary:
            temporary.write_bytes(packed.getvalue())
    except OSError as error:
        message = f"cannot write {out}: {error.strerror or error}; free space there, or choose another file"
        raise storage_error(message, error) from None
    return len(tensors)


def _categories(config: Config) -> tuple[tuple[Category, ...], str]:
    """The categories of the labels, and the digest of the shards that they come from."""
    shards = config.data.val or config.data.train
    if shards:
        index = load_index(shards)
        categories, digest = index.categories, index.digest
    elif config.data.labels == "raw":
        return COCO_CATEGORIES, ""
    else:
        raise ConfigError("the classes of these weights are not known; give data.val=SHARDS of data with these classes")
    if config.data.labels == "contiguous" and len(categories) != config.model.classes:
        raise ConfigError(f"{shards} has {len(categories)} categories, the weights have {config.model.classes}")
    beyond = [str(category.id) for category in categories if category.id >= config.model.classes]
    if config.data.labels == "raw" and beyond:  # no logit would ever stand for them
        raise ConfigError(
            f"{shards} has category ids {', '.join(beyond[:5])}, the weights have logits for ids below "
            f"{config.model.classes}; give data.val=SHARDS of data with the classes of these weights"
        )
    return categories, digest
