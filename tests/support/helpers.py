"""A small checkpoint and a small image, for the tests of prediction and registry."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline import checkpoint
from pipeline.checkpoint import STATE, TrainState
from pipeline.config import Config, dump, from_dict
from pipeline.data.index import Category
from pipeline.model import build_model
from pipeline.runs.evaluations import Evaluation, write_evaluations
from pipeline.runs.record import RunRecord
from support.model import SMALL

torch.set_num_threads(1)  # on a busy machine two threads that wait for each other cost seconds per small model

NAMES = ("disc", "square", "triangle", "ring", "cross")
METRICS = {"AP": 0.25, "AP50": 0.5, "AP_small": -1.0}


def tiny_config(**sections: Any) -> Config:
    """A detector of five classes over Conv5 that sees images at 96 px; the op needs no compiler."""
    model = {**SMALL, "op": "torch", "backbone": {"name": "conv5", "weights": "none", "norm": "group", "width": 8}}
    data = {"augment": {"eval_size": 96, "max_size": 128}}
    return from_dict({"name": "tiny", "model": model, "data": data, **sections})


def tiny_checkpoint(folder: Path, seed: int = 0, config: Config | None = None) -> Path:
    """A checkpoint with random weights in `folder/checkpoint`."""
    config = config or tiny_config()
    torch.manual_seed(seed)
    model = build_model(config.model)
    categories = tuple(Category(10 * (k + 1), name) for k, name in enumerate(NAMES))
    state = TrainState(dump(config), categories, "digest-of-the-shards", 1, 0, 7, 7)
    moments = {f"exp_avg/{name}": torch.zeros_like(value) for name, value in model.named_parameters()}
    checkpoint.save(folder / "checkpoint", state, model.state_dict(), moments)
    return folder / "checkpoint"


def as_version_3(checkpoint_folder: Path, *history: dict[str, float]) -> None:
    """Give a checkpoint the state that 0.1 wrote, which held the evaluations up to it."""
    path = checkpoint_folder / STATE
    document = json.loads(path.read_text())
    newest = {key: value for key, value in (history[-1] if history else {}).items() if key not in ("epoch", "step")}
    document |= {"version": 3, "metrics": newest, "history": history}
    del document["sha256"][STATE]
    rest = {key: value for key, value in document.items() if key != "sha256"}
    document["sha256"][STATE] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(document))


def tiny_run(folder: Path, config: Config | None = None, run_id: str | None = None) -> RunRecord:
    """The record of a finished run with one checkpoint and made-up AP."""
    config = config or tiny_config()
    path = str(tiny_checkpoint(folder, config=config))
    write_evaluations(str(folder), [Evaluation("checkpoint", {"epoch": 0.0, "step": 7.0, **METRICS})])
    metrics = {f"val/{key}": value for key, value in METRICS.items()}
    return RunRecord(config.name, str(folder), dump(config), run_id, "FINISHED", path, path, metrics)


def write_image(path: Path, size: tuple[int, int] = (120, 90), seed: int = 0) -> Path:
    """An image of noise, `size` = (width, height); the format follows the suffix."""
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path
