"""Multiply-adds: the formulas against sums worked out by hand, the two ways of counting, the papers' figures."""

import pytest
import torch
from support.model import VARIANTS, small_config
from support.paths import ROOT
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from pipeline.csrc import build
from pipeline.model import build_model, flops
from pipeline.model.ops import sampling
from pipeline.presets.published import find_published
from pipeline.presets.rows import find_presets

SHAPES = [(6, 5), (3, 2)]
BATCH, TOKENS, QUERIES, HEADS, POINTS, CHANNELS = 2, 36, 7, 3, 4, 8
POINT_CHANNELS = BATCH * QUERIES * HEADS * len(SHAPES) * POINTS * CHANNELS
AVERAGE = (800, 1133)  # of the area that the images of val2017 have on average at the evaluation size
PRESETS = find_presets(ROOT / "jobs" / "configs")


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("counting needs no kernels")

    monkeypatch.setattr(build, "load", refuse)


def inputs(fused: bool) -> list[torch.Tensor]:
    grid = (BATCH, QUERIES, HEADS, len(SHAPES), POINTS)
    sizes = [(BATCH, TOKENS, HEADS, CHANNELS), (*grid, 2), grid]
    if fused:
        sizes.insert(1, (BATCH, QUERIES, len(SHAPES), 2))
    return [torch.zeros(size, device="meta", requires_grad=True) for size in sizes]


@pytest.mark.parametrize("fused", [False, True])
def test_flops_operator_counts_sampling(fused: bool) -> None:
    value, *rest = inputs(fused)
    operator = sampling.ms_deform_attn_fused if fused else sampling.ms_deform_attn
    with FlopCounterMode(display=False) as forward:
        output = operator(value, SHAPES, *rest)
    assert output.shape == (BATCH, QUERIES, HEADS * CHANNELS)
    assert forward.get_total_flops() == 2 * 5 * POINT_CHANNELS
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * 8 * POINT_CHANNELS


@pytest.mark.parametrize(("wanted", "products"), [(0, 4), (1, 4), (2, 4)])
def test_flops_unwanted_gradient_is_not_counted(wanted: int, products: int) -> None:
    tensors = [tensor.requires_grad_(place == wanted) for place, tensor in enumerate(inputs(False))]
    output = sampling.ms_deform_attn(tensors[0], SHAPES, *tensors[1:])
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * products * POINT_CHANNELS


@pytest.mark.parametrize("groups", [1, 2])
def test_flops_deformable_convolution(groups: int) -> None:
    x, weight = torch.zeros(2, 4, 9, 8, device="meta"), torch.zeros(6, 4 // groups, 3, 3, device="meta")
    tensors = x, torch.zeros(2, 18, 9, 8, device="meta"), weight
    tensors[2].requires_grad_()
    pixels = 2 * 9 * 8
    with FlopCounterMode(display=False) as forward:
        out = deform_conv2d(*tensors, padding=1, mask=torch.zeros(2, 9, 9, 8, device="meta"))
    convolution, samples = pixels * 9 * 6 * 4 // groups, pixels * 9 * 4
    assert forward.get_total_flops() == 2 * (convolution + 4 * samples)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * (2 * convolution + 8 * samples)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_shapes_only_counts_the_same(variant: str) -> None:
    config = small_config(**VARIANTS[variant])
    with torch.device("meta"):
        model = build_model(config).eval()
    hollow = build_model(small_config(op="torch", **VARIANTS[variant])).eval()
    with flops._ShapesOnly():
        counted = flops._count(hollow, (96, 64))
    sampled = 5 * (2 * 126 + 3 * 12) * 4 * 3 * 2 * 8  # grid_sample has no formula: tokens and queries x M L P D
    assert flops._count(model, (96, 64)) == counted + sampled


def test_multiply_adds_is_mean_over_images() -> None:
    config = small_config()
    small, large = (flops.multiply_adds(config, {size: 1}) for size in ((64, 64), (96, 128)))
    assert flops.multiply_adds(config, {(64, 64): 3, (96, 128): 1}) == pytest.approx((3 * small + large) / 4)
    assert 2.5 < large / small < 3.5


@pytest.mark.parametrize("preset", [name for name in PRESETS if find_published(name).gflops])
def test_multiply_adds_within_five_percent_of_paper(preset: str) -> None:
    config = PRESETS[preset]
    counted = flops.multiply_adds(config.model, {AVERAGE: 1}) / 1e9
    assert counted == pytest.approx(find_published(preset).gflops, rel=0.05)
