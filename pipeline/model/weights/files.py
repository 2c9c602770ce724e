"""Reads files of weights without running any code in them.

Accepted are a run, a checkpoint folder of this project, and a published Deformable DETR or DETR checkpoint (`.pth`). A
Hugging Face model (`.safetensors`, `.bin`, or their folder) is accepted too. The first bytes and the names of the
tensors identify a file, not its suffix. Anything else is a CheckpointError.
"""

import argparse
import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.files.storage import local_copy
from pipeline.runs import record

WEIGHTS, AVERAGE, STATE = "model.safetensors", "average.safetensors", "state.json"  # of a checkpoint folder
ACCEPTED = "a run, a checkpoint folder, a published .pth, or a Hugging Face .safetensors or .bin"
Layout = Literal["own", "published", "hugging_face"]
# Settings in a published file's `args`; shown if weights do not fit.
_VARIANT = (
    "backbone",
    "dilation",
    "num_feature_levels",
    "with_box_refine",
    "two_stage",
    "enc_n_points",
    "dec_n_points",
)

# Those of a run of this project.
_SHAPE = (
    "name",
    "hidden_dim",
    "heads",
    "enc_layers",
    "dec_layers",
    "ffn_dim",
    "levels",
    "enc_points",
    "dec_points",
    "neck",
    "refine",
    "two_stage",
)
_BODY = ("name", "norm", "width")


@dataclass(frozen=True)
class WeightFile:
    """Tensors of a model, on the CPU, under the names of `layout`."""

    source: str  # as given by the user
    layout: Layout
    tensors: dict[str, Tensor]
    variant: dict[str, Any] = field(default_factory=dict)  # settings of its model, where the file or run has them


def read_weights(source: str) -> WeightFile:
    """Read the weights at a path or URL.

    Raises:
        CheckpointError: there is no file that can be read, or it holds no weights: truncated, foreign, or a pickle that
            needs more than tensors and settings.
        RunError: a run has no checkpoint, or a URL cannot be fetched.
    """
    if source.startswith("models:"):
        raise CheckpointError(f"{source}: registered models are not read here; give the run that was registered")
    with local_copy(source) as path:
        try:
            return _read_path(path, source)
        except OSError as error:
            raise CheckpointError(f"cannot read {error.filename or source}: {error.strerror or error}") from None


def _read_path(path: Path, source: str) -> WeightFile:
    """See `read_weights`; also raises OSError."""
    if not path.exists():
        raise CheckpointError(f"there is no {source}; give {ACCEPTED}")
    if not path.is_dir():
        return _read_file(path, source)
    if (path / record.FILE).is_file():
        run = record.read_run(str(path))
        return replace(read_weights(run.checkpoint), variant=_model_settings(run.config))
    if (path / STATE).is_file():
        digests = _digests(path)
        name = evaluated_file(digests)
        return WeightFile(source, "own", read_tensors(path / name, digests.get(name, "")))
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (path / name).is_file():
            return _read_file(path / name, source)
    raise CheckpointError(f"folder {source} holds no weights; give {ACCEPTED}")


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, after checking its digest if there is one. Raises CheckpointError."""
    check_digest(path, sha256)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def check_digest(path: Path, sha256: str | None) -> None:
    """Raise CheckpointError unless there is a file with this digest; None accepts any digest."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path.parent} lacks {path.name}; use an earlier one")
    if sha256 is not None and file_digest(path) != sha256:
        raise CheckpointError(f"checkpoint file {path} is damaged (sha256 differs); use an earlier one")


def evaluated_file(digests: Mapping[str, str]) -> str:
    """The checkpoint's file that is evaluated: the moving average of the weights if there is one, else the weights."""
    return AVERAGE if AVERAGE in digests else WEIGHTS


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """The digests of a checkpoint's files, from its state."""
    try:
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} is damaged or of another version: {error!r}") from None


def _model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that shape its model, as `key=value` has them."""
    model = config.get("model", {})
    found = {f"model.{key}": model[key] for key in _SHAPE if key in model}
    return found | {f"model.backbone.{key}": value for key, value in model.get("backbone", {}).items() if key in _BODY}


def _read_file(path: Path, source: str) -> WeightFile:
    variant: dict[str, Any] = {}
    with path.open("rb") as file:
        start = file.read(16)
    if start[8:9] == b"{":  # the header of safetensors is JSON after its length
        tensors = read_tensors(path)
    elif start[:4] == b"PK\3\4" or start[:2] == b"\x80\2":  # a zip, or the sequence of pickles of torch before 1.6
        tensors, variant = _read_pickle(path, source)
    else:
        page = " It looks like a web page: the download needs another link." if b"<" in start[:2] else ""
        raise CheckpointError(f"{source} is not a file of weights.{page} Give {ACCEPTED}")
    return WeightFile(source, _layout(tensors, source), tensors, variant)


def _read_pickle(path: Path, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of torch.save: its tensors and settings. Only tensors, containers and a Namespace are loaded."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            document = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked is None:
            raise CheckpointError(f"{source} is not a whole file of weights: {_first_line(error)}") from None
        raise CheckpointError(
            f"{source} is refused: its pickle asks for {asked[1]}, and what a pickle asks for is run. If you trust the "
            'file, save its weights alone where it was made: torch.save({"model": model.state_dict()}, PATH)'
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source} is not a whole file of weights: {_first_line(error)}") from None
    arguments = document.get("args") if isinstance(document, Mapping) else None
    variant = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    state = document.get("model", document) if isinstance(document, Mapping) else document
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        found = ", ".join(str(key) for key in list(state)[:8]) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(f"{source} holds neither a `model` with tensors nor tensors alone, but: {found}")
    return dict(state), {key: variant[key] for key in _VARIANT if key in variant}


def _layout(tensors: Mapping[str, Tensor], source: str) -> Layout:
    for key in tensors:
        if key.startswith("backbone.0."):
            return "published"
        if key.startswith(("model.backbone.", "model.encoder.")):
            return "hugging_face"
        if key.startswith("backbone."):
            return "own"
    some = ", ".join(list(tensors)[:4]) or "no tensors at all"
    raise CheckpointError(f"{source} is of none of the known layouts ({some}); give {ACCEPTED}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
