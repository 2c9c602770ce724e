"""How files.tar.xz was made, with version 0.1.0 of this project (commit 294b285); it must never be made anew.

`python make_files.py` wrote /tmp/old01, which was packed without its images and plots. All convolutions start at
zero, which keeps the file small.
"""

import json
from pathlib import Path

import ray
from PIL import Image
from pipeline.data.shards import build_shards
from pipeline.data.synthetic import write_synthetic
from pipeline.driver import train
from pipeline.predictor import Predictor

from pipeline import checkpoint
from pipeline.checkpoint import TrainState, load_inference
from pipeline.config import dump, load_config
from pipeline.data.index import load_index
from pipeline.model import build_model
from pipeline.registry import register

OUT = Path("/tmp/old01")
SETTINGS = {
    "name": "old",
    "storage": f"{OUT}/runs",
    "data.train": f"{OUT}/train",
    "data.val": f"{OUT}/val",
    "data.workers": 0,
    "data.augment.scales": [64],
    "data.augment.eval_size": 64,
    "data.augment.max_size": 96,
    "model.hidden_dim": 16,
    "model.heads": 2,
    "model.ffn_dim": 16,
    "model.queries": 5,
    "model.enc_layers": 1,
    "model.dec_layers": 1,
    "model.backbone.width": 8,
    "model.dropout": 0.0,
    "train.epochs": 2,
    "train.micro_batch": 2,
    "train.global_batch": 4,
    "train.log_steps": 1,
    "train.keep_checkpoints": 1,
    "train.eval_epochs": 1,
    "train.ema_decay": 0.9,
    "evaluation.where": "inline",
    "tracking.uri": f"sqlite:///{OUT}/mlflow.db",
    "tracking.register_as": "",
    "scaling.num_workers": 1,
}


def main() -> None:
    """Shards, a run, a version."""
    for seed, (split, images) in enumerate({"train": 8, "val": 4}.items()):
        annotations, folder = write_synthetic(OUT / "raw" / split, images=images, seed=seed, size=64)
        build_shards(annotations, folder, OUT / split)
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="WARNING")
    config = load_config("jobs/configs/demo.yaml", SETTINGS)
    weights = build_model(config.model).state_dict()
    for value in weights.values():
        if value.dim() == 4:
            value.zero_()
    index = load_index(config.data.train)
    state = TrainState(dump(config), index.categories, index.digest, 0, 0, 0, 0)
    checkpoint.save(OUT / "start", state, weights, {})
    record = train(load_config("jobs/configs/demo.yaml", SETTINGS | {"model.init_from": f"{OUT}/start"}))
    register(record, "old", "champion")
    image = Image.new("RGB", (64, 64), (200, 30, 90))
    (found,) = Predictor(load_inference(record.checkpoint)).predict([image], 0.0, 5)
    digests = {f"{split}_digest": load_index(f"{OUT}/{split}").digest for split in ("train", "val")}
    (OUT / "expected.json").write_text(json.dumps({"prediction": found, **digests}, indent=1))


if __name__ == "__main__":
    main()
