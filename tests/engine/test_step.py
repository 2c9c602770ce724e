"""The training step: equal at every world size, steady against bad gradients."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.model import small_detr
from support.state import TINY

from pipeline.config import AugmentConfig, DataConfig, LossConfig, OptimConfig, Precision, TrainConfig
from pipeline.data.loader import TrainLoader
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.engine.backend import PlainBackend
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine, StepResult, dropout_seed
from pipeline.engine.zero import DeepSpeedBackend
from pipeline.model import build_criterion, build_model
from pipeline.runtime import Runtime, single

MODELS = {
    "deformable_detr": (TINY.model_copy(update={"num_classes": 5, "dropout": 0.1}), LossConfig()),
    "detr": (small_detr(dropout=0.1), LossConfig(classification="softmax", class_weight=1, class_cost=1)),
}
TRAIN = TrainConfig(global_batch=6, micro_batch=2, zero_stage=1)
OPTIM = OptimConfig(lr=1e-3, backbone_lr=1e-3)
STEPS = 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    annotations, images = write_synthetic(folder / "raw", images=40, seed=3, size=96)
    build_shards(annotations, images, folder / "shards", samples_per_shard=16)
    return folder / "shards"


def build(runtime: Runtime, deepspeed: bool, precision: Precision = "fp32", name: str = "deformable_detr") -> Engine:
    torch.manual_seed(0)
    model, loss = MODELS[name]
    module = LossModule(build_model(model), build_criterion(loss), precision)
    if deepspeed:
        return Engine(module, DeepSpeedBackend(module, TRAIN, OPTIM, runtime), runtime, seed=0)
    return Engine(module, PlainBackend(module, OPTIM, runtime.device, precision), runtime, seed=0)


def run_steps(
    runtime: Runtime, shards: Path, deepspeed: bool, precision: Precision = "fp32", name: str = "deformable_detr"
) -> list[StepResult]:
    torch.set_num_threads(1)
    engine = build(runtime, deepspeed, precision, name)
    augment = AugmentConfig(scales=(96, 112), max_size=160, crop_scales=(96,), crop_range=(64, 96))
    data = DataConfig(train=str(shards), workers=0, augment=augment)
    loader = TrainLoader(data, TRAIN, 0, runtime.rank, runtime.world)
    batches = zip(range(STEPS), loader.epoch(0), strict=False)
    stop = (runtime.world - 1, 2)  # the last rank wants to leave after step 2
    return [engine.train_step(groups, step, (runtime.rank, step) == stop) for step, groups in batches]


@pytest.fixture(scope="module")
def one(shards: Path) -> list[StepResult]:
    return run_steps(single(), shards, deepspeed=False)


def run_models(runtime: Runtime, shards: Path) -> dict[str, list[StepResult]]:
    return {name: run_steps(runtime, shards, True, name=name) for name in MODELS}


def test_train_step_two_deepspeed_ranks_equal_one_plain_process(
    one: list[StepResult], shards: Path, tmp_path: Path
) -> None:
    # Three groups on two ranks: one rank runs a weight-0 group, and dropout is on.
    plain = {"deformable_detr": one, "detr": run_steps(single(), shards, False, name="detr")}
    for rank in run_ranks(run_models, 2, tmp_path, shards):
        for name, results in rank.items():
            for step, (a, b) in enumerate(zip(plain[name], results, strict=True)):
                assert b.losses == pytest.approx(a.losses, rel=1e-5, abs=1e-6), (name, step)
                assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4), (name, step)
                assert b.stop is a.stop is (step == 2)  # a request at one rank stops all ranks


def test_train_step_norm_ignores_groups_of_weight_zero(shards: Path) -> None:
    engine = build(single(), deepspeed=False)
    groups = next(TrainLoader(DataConfig(train=str(shards), workers=0), TRAIN, 0, 0, 1).epoch(0))
    idle = dataclasses.replace(groups[0], weight=0.0)
    norm = engine._norm_of_step([*groups, idle])
    assert (norm.num_boxes, norm.groups) == (sum(len(group.labels) for group in groups), 3)


def test_train_step_softmax_loss_is_the_mean_over_groups(shards: Path) -> None:
    """The class loss of a step, as DETR's GPUs averaged it, and the same gradient for one group given twice."""
    data = DataConfig(train=str(shards), workers=0, augment=AugmentConfig(scales=(96,), max_size=160, crop=0))
    groups = next(TrainLoader(data, TRAIN, 0, 0, 1).epoch(0))
    found = build(single(), deepspeed=False, name="detr").train_step(groups, 0).losses["loss_ce"]
    alone = [build(single(), deepspeed=False, name="detr").train_step([group], 0).losses for group in groups]
    assert found == pytest.approx(sum(losses["loss_ce"] for losses in alone) / 3, rel=1e-5)
    twice = build(single(), deepspeed=False, name="detr").train_step([groups[0], groups[0]], 0)
    once = build(single(), deepspeed=False, name="detr").train_step([groups[0]], 0)
    assert twice.losses == pytest.approx(once.losses, rel=1e-5)
    assert twice.grad_norm == pytest.approx(once.grad_norm, rel=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.002)])
def test_train_step_low_precision_is_near_fp32(
    one: list[StepResult], shards: Path, precision: Precision, tolerance: float
) -> None:
    half = run_steps(single(), shards, deepspeed=False, precision=precision)
    assert half[0].losses["loss"] == pytest.approx(one[0].losses["loss"], rel=tolerance)
    # fp16 finds its scale first, and says so
    assert all(r.applied != r.rescaled for r in half)
    first = next(i for i, r in enumerate(half) if r.applied)
    assert first < 4
    assert half[first].grad_norm == pytest.approx(one[first].grad_norm, rel=0.1) or first
    assert all(r.applied for r in half[first:])


def test_train_step_non_finite_gradient_changes_nothing(shards: Path) -> None:
    engine = build(single(), deepspeed=False)
    data = DataConfig(train=str(shards), workers=0, augment=AugmentConfig(scales=(96,), max_size=160, crop=0))
    groups = next(TrainLoader(data, TRAIN, 0, 0, 1).epoch(0))
    before = {n: p.clone() for n, p in engine.module.model.named_parameters()}
    spoiled = [groups[0].to(torch.device("cpu")), *groups[1:]]
    spoiled[0].images[0] = float("nan")
    result = engine.train_step(spoiled, 0)
    assert not result.applied
    assert result.image_ids == [int(i) for g in groups for i in g.image_ids]
    assert all(torch.equal(before[n], p) for n, p in engine.module.model.named_parameters())
    assert engine.train_step(groups, 1).applied


def test_train_step_images_without_boxes_train(shards: Path) -> None:
    engine = build(single(), deepspeed=False)
    data = DataConfig(train=str(shards), workers=0, augment=AugmentConfig(scales=(96,), max_size=160, crop=0))
    groups = [no_boxes(g) for g in next(TrainLoader(data, TRAIN, 0, 0, 1).epoch(0))]
    result = engine.train_step(groups, 0)
    assert result.applied
    assert result.losses["loss_bbox"] == 0
    state: Any = engine.backend.optimizer.state
    trained = [p for p in engine.module.model.parameters() if p.requires_grad]
    assert all(p in state for p in trained)  # every parameter was reached, so no rank waits for another


def no_boxes(batch: Any) -> Any:
    offsets = torch.zeros_like(batch.target_offsets)
    return dataclasses.replace(
        batch, boxes_cxcywh=batch.boxes_cxcywh[:0], labels=batch.labels[:0], target_offsets=offsets
    )


def test_dropout_seed_differs_by_step_and_group() -> None:
    seeds = {dropout_seed(seed, step, group) for seed in range(3) for step in range(10) for group in range(4)}
    assert len(seeds) == 120
