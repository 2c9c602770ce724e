"""A checkpoint folder: weights, optionally their average, optimizer moments (safetensors), and the state (JSON).

The state holds the digests of all files and of itself. A checkpoint contains no pickle and depends neither on the world
size nor on the ZeRO stage, so it can be loaded anywhere. After it is stored it never changes; its AP is in the run's
`evaluations.json`. Missing, damaged or foreign files raise CheckpointError.
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

# 2: optional average of the weights; 3: sizes of the files and a digest of the state itself; 4: no evaluations
VERSION = 4
READABLE = (1, 2, 3, 4)
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class TrainState:
    """Everything except tensors. `epoch` and `step` (within the epoch) are the next ones to run."""

    config: dict[str, Any]
    categories: tuple[Category, ...]
    data_digest: str  # of the training shards' index: the order of samples depends on it
    epoch: int
    step: int
    global_step: int  # optimizer steps done
    optimizer_step: int  # of those, the applied steps (a non-finite gradient skips a step)
    loss_scale: dict[str, Any] = field(default_factory=dict)  # fp16 only, else empty
    history: tuple[dict[str, float], ...] = ()  # evaluations in files of versions 1 to 3; never written


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; tensors are on the CPU."""

    state: TrainState
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor] | None  # of the weights, under their names; None if the run has none


@dataclass(frozen=True)
class Inference:
    """For prediction and evaluation: a model in eval mode and the meaning of its labels."""

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
    """Read only the JSON part. Raises CheckpointError."""
    return _read_state(Path(folder))[0]


def check_files(state: bytes, sizes: Mapping[str, int]) -> TrainState:
    """Parse a checkpoint's state and check the sizes of its files, without reading their content.

    Args:
        state: content of its `state.json`.
        sizes: bytes of every existing file.

    Raises:
        CheckpointVersionError: another version of this code wrote it.
        CheckpointError: the state is damaged, or a file is missing or truncated.
    """
    parsed, document = _parse_state(state, STATE)
    for name in document["sha256"]:
        expected = document.get("bytes", {}).get(name)  # older versions do not have it
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
    """Rebuild the evaluated model, for prediction or evaluation. Raises CheckpointError."""
    folder = Path(folder)
    state, digests = _read_state(folder)
    weights = _tensors(folder, evaluated_file(digests), digests)
    config = from_record(state.config, str(folder))
    model = build_model(config.model, load_backbone=False)  # the checkpoint holds its weights
    restore_weights(model, weights)
    return Inference(config, state.categories, model.eval(), state)


def check_inference(folder: str | Path) -> TrainState:
    """Check the digests of the files that `load_inference` reads, without loading them. Raises CheckpointError."""
    return _check_evaluated(Path(folder))[0]


def copy_inference(folder: str | Path, target: Path) -> None:
    """Copy only the files that `load_inference` reads into a new folder. Raises CheckpointError."""
    folder = Path(folder)
    _, name = _check_evaluated(folder)
    target.mkdir()
    for each in (name, STATE):
        shutil.copyfile(folder / each, target / each)


def restore_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load `weights` strictly. Raises CheckpointError naming the keys that do not match."""
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint is of another model (compare the `model` section): {error}") from None


def _check_evaluated(folder: Path) -> tuple[TrainState, str]:
    """The state, and the name of the file with the evaluated weights, whose digest is right."""
    state, digests = _read_state(folder)
    name = evaluated_file(digests)
    check_digest(folder / name, digests.get(name, ""))
    return state, name


def _read_state(folder: Path) -> tuple[TrainState, dict[str, str]]:
    try:
        content = (folder / STATE).read_bytes()
    except OSError:
        raise CheckpointError(f"{folder} is not a checkpoint (no {STATE})") from None
    state, document = _parse_state(content, str(folder / STATE))
    return state, document["sha256"]


def _parse_state(content: bytes, path: str) -> tuple[TrainState, dict[str, Any]]:
    """Parse the state; also returns the whole document."""
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
    """sha256 of a state's document without its digests, in a canonical form of JSON."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _tensors(folder: Path, name: str, digests: dict[str, str]) -> dict[str, torch.Tensor]:
    return read_tensors(folder / name, digests.get(name, ""))
