"""A checkpoint folder: weights, their average if there is one, and optimizer moments (safetensors), state (JSON).

The state holds the digests of all, its own among them. There is no pickle in it, and it knows neither world size nor
ZeRO stage, so it loads anywhere. `training.saving` writes one, Ray Train stores it, and nothing changes it then: its AP
is in the run's `evaluations.json`. `training.restoring`, `snapshot.py`, `registry.py`, `jobs.evaluate` and
`jobs.predict` read it. Missing, damaged or foreign files raise CheckpointError.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.config import Config, from_record
from pipeline.data.index import Category
from pipeline.errors import CheckpointError, CheckpointVersionError, storage_error
from pipeline.model import Detector, build_model
from pipeline.model.weights.files import (
    AVERAGE,
    STATE,
    WEIGHTS,
    check_digest,
    evaluated_file,
    file_digest,
    read_tensors,
)

# 2: there may be an average of the weights; 3: sizes of the files and a digest of the state itself; 4: no evaluations
VERSION = 4
READABLE = (1, 2, 3, 4)
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class TrainState:
    """Everything but tensors. `epoch` and `step` (within the epoch) are the next ones to run."""

    config: dict[str, Any]
    categories: tuple[Category, ...]
    data_digest: str  # of the training shards' index: the order of samples depends on it
    epoch: int
    step: int
    global_step: int  # optimizer steps done
    optimizer_step: int  # of those, steps that were applied (a non-finite gradient skips one)
    loss_scale: dict[str, Any] = field(default_factory=dict)  # of fp16, else empty
    history: tuple[dict[str, float], ...] = ()  # evaluations, in files of versions 1 to 3 alone; it is not written


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; tensors are on the CPU."""

    state: TrainState
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor] | None  # of the weights, under their names; None if the run kept none


@dataclass(frozen=True)
class Inference:
    """What prediction and evaluation need: a model in eval mode and what its labels mean."""

    config: Config
    categories: tuple[Category, ...]
    model: Detector
    state: TrainState


def save(
    folder: Path,
    state: TrainState,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    average: dict[str, torch.Tensor] | None = None,
) -> dict[str, str]:
    """Write a checkpoint into `folder`, the state last, so that a folder with a state is complete.

    Returns:
        sha256 of each tensor file by name.

    Raises:
        StorageError: the folder cannot be written.
    """
    files = {WEIGHTS: weights, OPTIMIZER: moments, **({} if average is None else {AVERAGE: average})}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / name)
        digests = {name: file_digest(folder / name) for name in files}
        document = {
            "version": VERSION,
            **{key: value for key, value in state.__dict__.items() if key != "history"},
            "categories": [category.__dict__ for category in state.categories],
            "bytes": {name: (folder / name).stat().st_size for name in files},
        }
        document["sha256"] = {**digests, STATE: _digest_of(document)}
        (folder / STATE).write_text(json.dumps(document, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        message = (
            f"cannot write checkpoint {folder}: {getattr(error, 'strerror', None) or error}; free space there, set "
            "TMPDIR to another disk, or change `storage`"
        )
        raise storage_error(message, error) from error
    return digests


def load_state(folder: str | Path) -> TrainState:
    """The JSON part alone. Raises CheckpointError."""
    return _read_state(Path(folder))[0]


def check_files(state: bytes, sizes: Mapping[str, int]) -> TrainState:
    """The state of a checkpoint whose files have the right sizes; what they hold is not read.

    Args:
        state: content of its `state.json`.
        sizes: bytes of every file that is there.

    Raises:
        CheckpointVersionError: another version of this code wrote it.
        CheckpointError: the state is damaged, or a file is missing or cut short.
    """
    parsed, document = _parse_state(state, STATE)
    for name in document["sha256"]:
        expected = document.get("bytes", {}).get(name)  # older versions do not say
        if name not in sizes:
            raise CheckpointError(f"{name} is missing")
        if expected is not None and sizes[name] != expected:
            raise CheckpointError(f"{name} has {sizes[name]} bytes of {expected}")
    return parsed


def load(folder: str | Path) -> Checkpoint:
    """Read a checkpoint and check its digests. Raises CheckpointError."""
    folder = Path(folder)
    state, digests = _read_state(folder)
    average = _tensors(folder, AVERAGE, digests) if AVERAGE in digests else None
    weights, moments = (_tensors(folder, name, digests) for name in (WEIGHTS, OPTIMIZER))
    return Checkpoint(state, weights, moments, average)


def load_inference(folder: str | Path) -> Inference:
    """Rebuild the model that was evaluated, for prediction or evaluation. Raises CheckpointError."""
    folder = Path(folder)
    state, digests = _read_state(folder)
    weights = _tensors(folder, evaluated_file(digests), digests)
    config = from_record(state.config, str(folder))
    model = build_model(config.model, load_backbone=False)  # the checkpoint holds its weights
    restore_weights(model, weights)
    return Inference(config, state.categories, model.eval(), state)


def copy_inference(folder: str | Path, target: Path) -> None:
    """Copy what `load_inference` reads, and nothing else, into a new folder. Raises CheckpointError."""
    folder = Path(folder)
    digests = _read_state(folder)[1]
    name = evaluated_file(digests)
    check_digest(folder / name, digests.get(name, ""))
    target.mkdir()
    for each in (name, STATE):
        shutil.copyfile(folder / each, target / each)


def restore_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load `weights` strictly. Raises CheckpointError naming the keys that do not match."""
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint is of another model (compare the `model` section): {error}") from None


def _read_state(folder: Path) -> tuple[TrainState, dict[str, str]]:
    try:
        content = (folder / STATE).read_bytes()
    except OSError:
        raise CheckpointError(f"{folder} is not a checkpoint (no {STATE})") from None
    state, document = _parse_state(content, str(folder / STATE))
    return state, document["sha256"]


def _parse_state(content: bytes, path: str) -> tuple[TrainState, dict[str, Any]]:
    """The state, and the whole document that it comes from."""
    try:
        document = json.loads(content)
        version = document["version"]
        if version not in READABLE:
            raise CheckpointVersionError(
                f"{path} has version {version}, this code reads {READABLE}; load it with the code that wrote it"
            )
        if version >= 3 and document["sha256"][STATE] != _digest_of(document):
            raise CheckpointError(f"{path} is damaged (sha256 differs); resume from an earlier one")
        fields = {key: value for key, value in document.items() if key not in ("version", "bytes", "sha256", "metrics")}
        fields["categories"] = tuple(Category(**category) for category in document["categories"])
        fields["history"] = tuple(document.get("history", ()))
        return TrainState(**fields), document
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None


def _digest_of(document: Mapping[str, Any]) -> str:
    """sha256 of a state's document without its digests, in the one form that JSON keeps."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _tensors(folder: Path, name: str, digests: dict[str, str]) -> dict[str, torch.Tensor]:
    return read_tensors(folder / name, digests.get(name, ""))
