"""A loaded checkpoint of a small detector, and a run that has one."""

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.checkpoint import Inference, TrainState, save
from pipeline.config import AugmentConfig, Config, DataConfig, EvaluationConfig, TrackingConfig, dump
from pipeline.data.index import load_index
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.model import build_model
from pipeline.runs.record import RunRecord, write_run
from pipeline.tracking.run import start_run
from support.model import small_config


def small_detector(shards: Path, evaluation: EvaluationConfig | None = None) -> tuple[Config, Inference]:
    """A model of random weights and the settings of its evaluation on `shards`, which have five categories."""
    data = DataConfig(val=str(shards), workers=0, augment=AugmentConfig(eval_size=96, max_size=160))
    config = Config(data=data, model=small_config(op="torch"), evaluation=evaluation or EvaluationConfig())
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    state = TrainState(dump(config), load_index(str(shards)).categories, "", 1, 0, 1, 1)
    return config, Inference(config, state.categories, model, state)


def small_run(folder: Path, name: str = "small", seed: int = 0, tracked: bool = True) -> RunRecord:
    """A run with random weights over shards `folder/val` of six drawn images; if `tracked`, with an MLflow run."""
    shards = folder / "val"
    if not shards.exists():
        build_shards(*write_synthetic(folder / "drawn", images=6, seed=8), shards)
    config, inference = small_detector(shards)
    uri = f"sqlite:///{folder}/mlflow.db"
    config = config.model_copy(update={"tracking": TrackingConfig(uri=uri), "name": name, "storage": str(folder)})
    torch.manual_seed(seed)
    checkpoint = folder / name / "checkpoint_00000001_00000000"
    state = replace(inference.state, config=dump(config))
    save(checkpoint, state, build_model(config.model).state_dict(), {})
    run_id = start_run(config.tracking, config, name) if tracked else None
    record = RunRecord(name, str(folder / name), dump(config), run_id, status="FINISHED", last=str(checkpoint))
    write_run(record)
    return record
