"""Epochs of small shards through real loaders, compared to the bit."""

import itertools
from pathlib import Path
from typing import Any

import torch

from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import TrainLoader

AUGMENT = AugmentConfig(scales=(64, 72), max_size=96, crop_scales=(64, 80), crop_range=(48, 64), eval_size=64)
TRAIN = TrainConfig(global_batch=4, micro_batch=2)


def config(folder: str, cache: Path, workers: int = 0, **change: Any) -> DataConfig:
    options = {"mix_shards": 2, "window": 4, "augment": AUGMENT, "cache_dir": str(cache), **change}
    return DataConfig(train=folder, val=folder, workers=workers, **options)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.image_ids, b.image_ids) and a.group == b.group


def epoch_of(data: DataConfig, world: int = 1, epoch: int = 0) -> list[list[Batch]]:
    """The epoch of all ranks, step by step as they would run it together."""
    loaders = [TrainLoader(data, TRAIN, 0, rank, world).epoch(epoch) for rank in range(world)]
    steps = (itertools.chain(*shares) for shares in zip(*loaders, strict=True))
    return [sorted((batch for batch in step if batch.weight), key=lambda batch: batch.group) for step in steps]


def equal_epochs(a: list[list[Batch]], b: list[list[Batch]]) -> bool:
    pairs = zip(itertools.chain(*a), itertools.chain(*b), strict=True)
    return all(same(x, y) for x, y in pairs)
