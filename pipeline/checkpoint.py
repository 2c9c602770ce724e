"""A checkpoint folder: weights, their average if there is one, and optimizer moments (safetensors), state (JSON).

The state holds the digests of the others. There is no pickle in it, and it knows neither world size nor ZeRO stage, so
it loads anywhere. `worker.py` writes one, Ray Train stores it; `driver.py`, `registry.py`, `jobs.evaluate` and
`jobs.predict` read it. Missing, damaged or foreign files raise CheckpointError.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.config import Config, from_dict
from pipeline.data.index import Category
from pipeline.errors import CheckpointError
from pipeline.model import Detector, build_model
from pipeline.model.weight_files import AVERAGE, STATE, WEIGHTS, check_digest, evaluated, file_digest, read_tensors

VERSION = 2  # 2: there may be an average of the weights
READABLE = (1, 2)
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
        digests = {name: file_digest(folder / name) for name in files}
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
    average = _tensors(folder, AVERAGE, digests) if AVERAGE in digests else None
    weights, moments = (_tensors(folder, name, digests) for name in (WEIGHTS, OPTIMIZER))
    return Checkpoint(state, weights, moments, average)


def load_inference(folder: str | Path) -> Inference:
    """Rebuild the model that was evaluated, for prediction or evaluation. Raises CheckpointError."""
    folder = Path(folder)
    state, digests = _read_state(folder)
    weights = _tensors(folder, evaluated(digests), digests)
    config = from_dict(state.config, str(folder))
    model = build_model(config.model, load_backbone=False)  # the checkpoint holds its weights
    restore_weights(model, weights)
    return Inference(config, state.categories, model.eval(), state)


def copy_inference(folder: str | Path, target: Path) -> None:
    """Copy what `load_inference` reads, and nothing else, into a new folder. Raises CheckpointError."""
    folder = Path(folder)
    digests = _read_state(folder)[1]
    name = evaluated(digests)
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


def _tensors(folder: Path, name: str, digests: dict[str, str]) -> dict[str, torch.Tensor]:
    return read_tensors(folder / name, digests.get(name, ""))
