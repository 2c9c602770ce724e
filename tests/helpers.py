"""A small checkpoint and a small picture, for the tests of prediction and registry."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers_model import SMALL
from PIL import Image

from pipeline import checkpoint
from pipeline.checkpoint import TrainState
from pipeline.config import Config, dump, from_dict
from pipeline.data.index import Category
from pipeline.model import build_model
from pipeline.runs import RunRecord

torch.set_num_threads(1)  # on a busy machine two threads that wait for each other cost seconds per small model

NAMES = ("disc", "square", "triangle", "ring", "cross")
METRICS = {"AP": 0.25, "AP50": 0.5, "AP_small": -1.0}


def tiny_config(**sections: Any) -> Config:
    """A detector of five classes over Conv5 that sees pictures at 96 px; the op needs no compiler."""
    model = {**SMALL, "op": "torch", "backbone": {"name": "conv5", "weights": "none", "norm": "group", "width": 8}}
    data = {"augment": {"eval_size": 96, "max_size": 128}}
    return from_dict({"name": "tiny", "model": model, "data": data, **sections})


def tiny_checkpoint(folder: Path, seed: int = 0, config: Config | None = None) -> Path:
    """A checkpoint with random weights and made-up AP in `folder/checkpoint`."""
    config = config or tiny_config()
    torch.manual_seed(seed)
    model = build_model(config.model)
    categories = tuple(Category(10 * (k + 1), name) for k, name in enumerate(NAMES))
    history = ({"epoch": 0.0, "step": 7.0, **METRICS},)
    state = TrainState(dump(config), categories, "digest-of-the-shards", 1, 0, 7, 7, METRICS, history)
    moments = {f"exp_avg/{name}": torch.zeros_like(value) for name, value in model.named_parameters()}
    checkpoint.save(folder / "checkpoint", state, model.state_dict(), moments)
    return folder / "checkpoint"


def tiny_run(folder: Path, config: Config | None = None, run_id: str | None = None) -> RunRecord:
    """The record of a finished run with one checkpoint."""
    config = config or tiny_config()
    path = str(tiny_checkpoint(folder, config=config))
    metrics = {f"val/{key}": value for key, value in METRICS.items()}
    return RunRecord(config.name, str(folder), dump(config), run_id, "FINISHED", path, path, metrics)


def picture(path: Path, size: tuple[int, int] = (120, 90), seed: int = 0) -> Path:
    """A picture of noise, `size` = (width, height); the format follows the suffix."""
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path
