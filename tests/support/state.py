"""A tiny model and the state of its training."""

from pipeline.checkpoint import TrainState
from pipeline.config import BackboneConfig, Config, ModelConfig, dump
from pipeline.data.index import Category

TINY = ModelConfig(
    num_classes=3, hidden_dim=32, heads=4, enc_layers=1, dec_layers=2, ffn_dim=32, queries=5, levels=3, refine=True,
    backbone=BackboneConfig(name="conv5", weights="none", norm="group", width=8),
)  # fmt: skip


STATE_OF_TEST = TrainState(
    dump(Config(model=TINY)), (Category(1, "disc"), Category(7, "ring"), Category(9, "cross")), "digest", 3, 5, 99, 98,
    {"scale": 1024.0, "finite_steps": 7},
)  # fmt: skip
