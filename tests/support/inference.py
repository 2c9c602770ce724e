"""A loaded checkpoint of a small detector, without a run."""

from pathlib import Path

import torch

from pipeline.checkpoint import Inference, TrainState
from pipeline.config import AugmentConfig, Config, DataConfig, EvaluationConfig, dump
from pipeline.data.index import load_index
from pipeline.model import build_model
from support.model import small_config


def small_detector(shards: Path, evaluation: EvaluationConfig | None = None) -> tuple[Config, Inference]:
    """A model of random weights and the settings of its evaluation on `shards`, which have five categories."""
    data = DataConfig(val=str(shards), workers=0, augment=AugmentConfig(eval_size=96, max_size=160))
    config = Config(data=data, model=small_config(op="torch"), evaluation=evaluation or EvaluationConfig())
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    state = TrainState(dump(config), load_index(str(shards)).categories, "", 1, 0, 1, 1)
    return config, Inference(config, state.categories, model, state)
