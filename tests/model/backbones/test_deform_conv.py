"""Modulated deformable convolution against grid_sample tap by tap; its initial state and its precision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model.backbones.deform_conv import ModulatedDeformConv2d

GEOMETRIES = {"plain": (1, 1, 1), "stride": (2, 1, 1), "dilation": (1, 2, 1), "groups": (2, 1, 4)}


def deformable(stride: int = 1, dilation: int = 1, groups: int = 1, start: bool = False) -> ModulatedDeformConv2d:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, 3, stride, dilation, dilation, groups, bias=False)
    module = ModulatedDeformConv2d(plain)
    if not start:
        for parameter in module.conv_offset.parameters():
            nn.init.normal_(parameter, std=0.2)
    return module


def tap_by_tap(module: ModulatedDeformConv2d, x: Tensor, groups: int) -> Tensor:
    """The sum over taps of w_k * x(p + p_k + dp_k) * dm_k, equation 1 of arXiv 1811.11168, zeros outside."""
    moves = module.conv_offset(x)
    batch, _, rows, columns = moves.shape
    height, width = x.shape[2:]
    y0 = torch.arange(rows).view(-1, 1) * module.stride
    x0 = torch.arange(columns).view(1, -1) * module.stride
    total = torch.zeros(batch, len(module.weight), rows, columns)
    for tap in range(9):
        y = y0 + (tap // 3 - 1) * module.dilation + moves[:, 2 * tap]
        column = x0 + (tap % 3 - 1) * module.dilation + moves[:, 2 * tap + 1]
        grid = torch.stack([(column + 0.5) / width, (y + 0.5) / height], dim=-1) * 2 - 1
        sampled = grid_sample(x, grid, align_corners=False) * moves[:, 18 + tap, None].sigmoid()
        weight = module.weight[:, :, tap // 3, tap % 3].unflatten(0, (groups, -1))
        total += torch.einsum("goc,ngchw->ngohw", weight, sampled.unflatten(1, (groups, -1))).flatten(1, 2)
    return total


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_deform_conv_equals_equation(geometry: tuple[int, int, int]) -> None:
    module, x = deformable(*geometry), torch.randn(2, 8, 7, 9, requires_grad=True)
    leaves = (x, *module.parameters())
    results = []
    for output in (module(x), tap_by_tap(module, x, geometry[2])):
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_deform_conv_starts_as_half_the_plain(geometry: tuple[int, int, int]) -> None:
    stride, dilation, groups = geometry
    module, x = deformable(*geometry, start=True), torch.randn(2, 8, 7, 9)
    plain = nn.functional.conv2d(x, module.weight, None, stride, dilation, dilation, groups)
    torch.testing.assert_close(module(x), plain / 2, rtol=1e-4, atol=1e-5)


def test_deform_conv_has_gradients_at_start() -> None:
    module = deformable(start=True)
    module(torch.randn(1, 8, 6, 6)).square().sum().backward()
    grad = module.conv_offset.weight.grad
    assert grad is not None
    assert (grad.flatten(1).abs().sum(1) > 0).all()  # offsets and weights of all nine taps


class Operands(TorchDispatchMode):
    """The types of what deform_conv2d is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "deform_conv2d" in str(func):
            self.seen += [arg.dtype for arg in args if isinstance(arg, Tensor)]
        return func(*args, **(kwargs or {}))


def test_deform_conv_autocast_keeps_offsets_float32() -> None:
    module, x = deformable(), torch.randn(1, 8, 6, 6)
    with Operands() as operands, torch.autocast("cpu", torch.bfloat16):
        half = module(x.bfloat16())
        half.float().sum().backward()
    assert half.dtype == torch.bfloat16
    assert set(operands.seen) == {torch.float32}
    torch.testing.assert_close(half.float(), module(x.bfloat16().float()), rtol=0.01, atol=0.01)
