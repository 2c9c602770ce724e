"""Necks: sizes, connections between levels, and BiFPN against the paper's equations."""

import pytest
import torch
from support.model import small_config
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, interpolate, max_pool2d

from pipeline.model.necks import FPN, BiFPN, Fusion, build_neck, resize

PYRAMIDS = {
    "halving": [(16, 24), (8, 12), (4, 6), (2, 3)],
    "odd": [(100, 167), (50, 84), (25, 42), (13, 21)],
    "seven": [(65, 33), (33, 17), (17, 9), (9, 5), (5, 3), (3, 2), (2, 1)],
    "two": [(7, 5), (4, 3)],
    "dc5": [(12, 20), (6, 10), (6, 10), (3, 5)],  # the last backbone stage keeps its size
    "thirds": [(27, 30), (9, 10), (2, 3)],
    "one_pixel": [(2, 1), (1, 1), (1, 1)],
}
WIDTH = 12


def pyramid(sizes: list[tuple[int, int]], width: int = WIDTH, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, width, *size) for size in sizes]


@pytest.mark.parametrize("sizes", PYRAMIDS.values(), ids=PYRAMIDS)
@pytest.mark.parametrize("kind", ["fpn", "bifpn"])
def test_neck_keeps_shapes(kind: str, sizes: list[tuple[int, int]]) -> None:
    neck = FPN(WIDTH, len(sizes)) if kind == "fpn" else BiFPN(WIDTH, len(sizes), repeats=2)
    maps = pyramid(sizes)
    mixed = neck(maps)
    assert [x.shape for x in mixed] == [x.shape for x in maps]
    torch.stack([x.square().sum() for x in mixed]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())


@pytest.mark.parametrize("width", [10, 64, 88, 112])
def test_neck_any_width_works(width: int) -> None:
    maps = pyramid([(8, 8), (4, 4), (2, 2)], width)
    assert [x.shape for x in BiFPN(width, 3, 1)(maps)] == [x.shape for x in maps]


def reached(neck: torch.nn.Module, sizes: list[tuple[int, int]]) -> list[list[bool]]:
    """Row i: which inputs the output of level i has a gradient for."""
    rows = []
    for level in range(len(sizes)):
        maps = [x.requires_grad_() for x in pyramid(sizes)]
        neck(maps)[level].square().sum().backward()
        rows.append([bool(x.grad is not None and x.grad.any()) for x in maps])
    return rows


def test_fpn_passes_top_down_only() -> None:
    assert reached(FPN(WIDTH, 3), PYRAMIDS["halving"][:3]) == [[True] * 3, [False, True, True], [False, False, True]]


def test_bifpn_layer_joins_all_levels() -> None:
    assert reached(BiFPN(WIDTH, 4, 1), PYRAMIDS["halving"]) == [[True] * 4] * 4


def test_bifpn_equals_paper() -> None:
    """P4 of section 3.3 as printed: the path down, then the path up with three inputs, for three levels."""
    neck = BiFPN(WIDTH, 3, 1).double()
    for parameter in neck.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.5)

    def node(fusion: Fusion, *maps: Tensor) -> Tensor:
        w = fusion.shares.clamp(min=0)
        x = sum(wi * mi for wi, mi in zip(w, maps, strict=True)) / (w.sum() + 1e-4)
        x = x * torch.sigmoid(x)
        x = conv2d(conv2d(x, fusion.depthwise.weight, padding=1, groups=WIDTH), fusion.pointwise.weight)
        return group_norm(x, fusion.norm.num_groups, fusion.norm.weight, fusion.norm.bias)

    def up(x: Tensor) -> Tensor:
        return interpolate(x, scale_factor=2)

    def down(x: Tensor) -> Tensor:
        return max_pool2d(x, 3, 2, 1)

    p3, p4, p5 = (x.double() for x in pyramid([(16, 24), (8, 12), (4, 6)], batch=2))
    (layer,) = neck.layers
    p4_td = node(layer.down[0], p4, up(p5))
    p3_out = node(layer.up[0], p3, up(p4_td))
    p4_out = node(layer.up[1], p4, p4_td, down(p3_out))
    p5_out = node(layer.up[2], p5, down(p4_out))
    for actual, expected in zip(neck([p3, p4, p5]), (p3_out, p4_out, p5_out), strict=True):
        torch.testing.assert_close(actual, expected)


def test_fusion_weights_sum_to_one() -> None:
    fusion = Fusion(WIDTH, 2)
    a, b = torch.randn(2, 1, WIDTH, 4, 4)
    halves = fusion(a, a)
    with torch.no_grad():
        fusion.shares.copy_(torch.tensor([3.0, -5.0]))
    torch.testing.assert_close(fusion(a, b), halves, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fusion(a, b), fusion(a, torch.zeros_like(b)))
    with torch.no_grad():
        fusion.shares.fill_(-1.0)
    assert fusion(a, b).isfinite().all()  # nothing left to share: zero over epsilon


def test_neck_image_does_not_depend_on_batch() -> None:
    neck = BiFPN(WIDTH, 3, 2).train()
    maps = pyramid(PYRAMIDS["thirds"], batch=3)
    for together, alone in zip(neck(maps), neck([x[1:2] for x in maps]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_resize_nearest_or_maximum() -> None:
    x = torch.arange(25.0).view(1, 1, 5, 5)
    assert resize(x, torch.empty(1, 1, 5, 5)) is x
    assert resize(x, torch.empty(1, 1, 3, 3)).flatten().tolist() == [6, 8, 9, 16, 18, 19, 21, 23, 24]
    assert resize(x, torch.empty(1, 1, 1, 2)).flatten().tolist() == [22, 24]
    assert resize(x[..., :2, :2], torch.empty(1, 1, 4, 3))[0, 0].tolist() == [
        [0, 0, 1],
        [0, 0, 1],
        [5, 5, 6],
        [5, 5, 6],
    ]


def test_neck_autocast_works() -> None:
    maps = pyramid(PYRAMIDS["odd"][1:])
    for neck in (FPN(WIDTH, 3), BiFPN(WIDTH, 3, 2)):
        exact = neck(maps)
        with torch.autocast("cpu", torch.bfloat16):
            half = neck(maps)
        for a, b in zip(exact, half, strict=True):
            torch.testing.assert_close(b.float(), a, rtol=0.1, atol=0.2)


def test_build_neck_follows_config() -> None:
    assert build_neck(small_config()) is None
    assert isinstance(build_neck(small_config(neck="fpn")), FPN)
    neck = build_neck(small_config(neck="bifpn", neck_layers=2))
    assert isinstance(neck, BiFPN)
    assert len(neck.layers) == 2
