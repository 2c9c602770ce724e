"""A checkpoint folder: weights, their average if there is one, and optimizer moments (safetensors), state (JSON).

The state holds the digests of the others. There is no pickle in it, and it knows neither world size nor ZeRO stage, so
it loads anywhere. `worker.py` writes one, Ray Train stores it; `driver.py`, `registry.py`, `jobs.evaluate` and
`jobs.predict` read it. Missing, damaged or foreign files raise CheckpointError.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.config import Config, from_dict
from pipeline.data.index import Category
from pipeline.errors import CheckpointError
from pipeline.model import Detector, build_model

VERSION = 2  # 2: there may be an average of the weights
READABLE = (1, 2)
WEIGHTS, AVERAGE, OPTIMIZER = "model.safetensors", "average.safetensors", "optimizer.safetensors"
STATE = "state.json"


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
    metrics: dict[str, float] = field(default_factory=dict)  # newest evaluation
    history: tuple[dict[str, float], ...] = ()  # every evaluation so far
    loss_scale: dict[str, Any] = field(default_factory=dict)  # of fp16, else empty


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
    """
    files = {WEIGHTS: weights, OPTIMIZER: moments, **({} if average is None else {AVERAGE: average})}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / name)
        digests = {name: _sha256(folder / name) for name in files}
        document = {
            "version": VERSION,
            **state.__dict__,
            "categories": [category.__dict__ for category in state.categories],
            "sha256": digests,
        }
        (folder / STATE).write_text(json.dumps(document, indent=1))
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {folder}: {error.strerror}; free space or change `storage`"
        ) from error
    return digests


def load_state(folder: str | Path) -> TrainState:
    """The JSON part alone. Raises CheckpointError."""
    return _read_state(Path(folder))[0]


def load(folder: str | Path) -> Checkpoint:
    """Read a checkpoint and check its digests. Raises CheckpointError."""
    folder = Path(folder)
    state, digests = _read_state(folder)
    average = _read_tensors(folder, AVERAGE, digests) if AVERAGE in digests else None
    weights, moments = (_read_tensors(folder, name, digests) for name in (WEIGHTS, OPTIMIZER))
    return Checkpoint(state, weights, moments, average)


def load_inference(folder: str | Path) -> Inference:
    """Rebuild the model that was evaluated, for prediction or evaluation. Raises CheckpointError."""
    folder = Path(folder)
    state, digests = _read_state(folder)
    weights = _read_tensors(folder, _evaluated(digests), digests)
    config = from_dict(state.config, str(folder))
    model = build_model(config.model, load_backbone=False)  # the checkpoint holds its weights
    restore_weights(model, weights)
    return Inference(config, state.categories, model.eval(), state)


def copy_inference(folder: str | Path, target: Path) -> None:
    """Copy what `load_inference` reads, and nothing else, into a new folder. Raises CheckpointError."""
    folder = Path(folder)
    digests = _read_state(folder)[1]
    name = _evaluated(digests)
    _check_digest(folder, name, digests)
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
    path = folder / STATE
    try:
        document = json.loads(path.read_text())
        version = document.pop("version")
        if version not in READABLE:
            raise CheckpointError(
                f"{path} has version {version}, this code reads {READABLE}; load it with the code that wrote it"
            )
        digests = document.pop("sha256")
        document["categories"] = tuple(Category(**category) for category in document["categories"])
        document["history"] = tuple(document["history"])
        return TrainState(**document), digests
    except OSError:
        raise CheckpointError(f"{folder} is not a checkpoint (no {STATE})") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None


def _evaluated(digests: dict[str, str]) -> str:
    """The file of the weights that the checkpoint's AP is of."""
    return AVERAGE if AVERAGE in digests else WEIGHTS


def _read_tensors(folder: Path, name: str, digests: dict[str, str]) -> dict[str, torch.Tensor]:
    _check_digest(folder, name, digests)
    try:
        tensors: dict[str, torch.Tensor] = load_file(folder / name)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / name} is not a safetensors file: {error}") from None
    return tensors


def _check_digest(folder: Path, name: str, digests: dict[str, str]) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder} lacks {name}; resume from an earlier one")
    if _sha256(path) != digests.get(name):
        raise CheckpointError(f"checkpoint file {path} is damaged (sha256 differs); resume from an earlier one")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
