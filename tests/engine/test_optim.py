"""The published parameter groups and the schedules."""

import itertools
from typing import Literal

import pytest
import torch
from support.model import small_detr
from support.state import TINY

from pipeline.config import OptimConfig
from pipeline.engine.optim import build_optimizer, lr_factor, parameter_groups, rates_for_batch, set_learning_rates
from pipeline.model import build_model


def test_parameter_groups_partition_the_trainable_parameters() -> None:
    model = build_model(TINY)
    groups = parameter_groups(model, OptimConfig())
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [(g["name"], g["lr"]) for g in groups] == [
        ("main", 2e-4),
        ("backbone", 2e-5),
        ("projection", pytest.approx(2e-5)),
    ]


def test_parameter_groups_projection_has_offsets_and_reference_points() -> None:
    model = build_model(TINY)
    names = {id(p): n for n, p in model.named_parameters()}
    projection = next(g for g in parameter_groups(model, OptimConfig()) if g["name"] == "projection")
    found = {names[id(p)] for p in projection["params"]}
    wanted = {n for n in names.values() if "sampling_offsets" in n or "reference_points" in n}
    assert found == wanted
    # weight and bias of the offsets in each layer, and of the one reference-point projection
    assert len(found) == 2 * (TINY.enc_layers + TINY.dec_layers) + 2


def test_lr_factor_drops_once_per_listed_epoch() -> None:
    optim = OptimConfig(drop_epochs=(3, 5), drop_factor=0.1)
    factors = [lr_factor(optim, epoch, 10 * epoch, 70) for epoch in range(7)]
    assert factors == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_lr_factor_warm_up_rises_linearly(schedule: Literal["step", "cosine"]) -> None:
    optim = OptimConfig(schedule=schedule, warmup_steps=4, drop_epochs=(40,))
    assert [lr_factor(optim, 0, step, 100) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_lr_factor_cosine_falls_to_zero_and_stays() -> None:
    optim = OptimConfig(schedule="cosine", warmup_steps=10, drop_epochs=(1,))
    factors = [lr_factor(optim, 0, step, 110) for step in range(10, 120)]
    assert factors[0] == 1
    assert factors[50] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(factors[:101]))
    assert 0 < factors[99] < 1e-3  # the last step of the run still moves
    assert factors[100:] == pytest.approx([0] * 10)


@pytest.mark.parametrize("total", [1, 3, 4])
def test_lr_factor_run_shorter_than_warm_up_has_rates(total: int) -> None:
    optim = OptimConfig(schedule="cosine", warmup_steps=4)
    assert [lr_factor(optim, 0, step, total) for step in range(total)] == [(step + 1) / 4 for step in range(total)]


def test_set_learning_rates_scales_base_rates() -> None:
    optimizer = build_optimizer(build_model(TINY), OptimConfig(lr=1e-3), torch.device("cpu"))
    set_learning_rates(optimizer, 0.1)
    rates = set_learning_rates(optimizer, 0.5)  # not compounded
    assert rates == pytest.approx({"main": 5e-4, "backbone": 1e-5, "projection": 5e-5})


def test_parameter_groups_without_projections_are_two() -> None:
    """DeepSpeed drops an empty group, and would shift the ones behind it."""
    model = build_model(small_detr())
    optim = OptimConfig(lr=1e-4, backbone_lr=1e-5)
    groups = parameter_groups(model, optim)
    assert [(g["name"], g["lr"]) for g in groups] == [("main", 1e-4), ("backbone", 1e-5)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.backbone.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_rates_for_batch_follow_the_square_root_of_the_batch() -> None:
    optim = OptimConfig(lr=4e-4, backbone_lr=1e-4, batch=8)
    assert rates_for_batch(optim, 8) == optim
    smaller = rates_for_batch(optim, 2)
    assert (smaller.lr, smaller.backbone_lr) == pytest.approx((2e-4, 5e-5))
    plain = OptimConfig(lr=4e-4)
    assert rates_for_batch(plain, 2) == plain
