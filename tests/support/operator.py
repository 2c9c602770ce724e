"""Random inputs of the operator, and one run of it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.model.ops import sampling

SHAPES = [(6, 4), (3, 2), (1, 5), (1, 1)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Also the name of the implementation under test."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


Inputs = tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]


def inputs(
    device: str,
    *,
    batch: int = 2,
    queries: int = 7,
    heads: int = 3,
    channels: int = 8,
    points: int = 4,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
) -> Inputs:
    """Random tensors. Points lie up to two pixels off the map, and 0.05 pixels away from where the gradient jumps."""
    generator = torch.Generator().manual_seed(channels + 1000 * points + 7 * queries)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    size = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64)[:, None]
    outer = (batch, queries, heads, len(shapes), points)
    random = torch.rand(*outer, 2, generator=generator, dtype=torch.float64)
    cell = (random * (size + 4) - 2).floor()
    inside_cell = 0.05 + 0.9 * torch.rand(*outer, 2, generator=generator, dtype=torch.float64)
    locations = (cell + inside_cell + 0.5) / size
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels, generator=generator, dtype=real)
    weights = torch.rand(outer, generator=generator, dtype=real)
    return (
        value.to(device, dtype).requires_grad_(grad),
        list(shapes),
        locations.to(device, real).requires_grad_(grad),
        weights.to(device).requires_grad_(grad),
    )


def run(given: Inputs, impl: str, grad: Tensor | None = None) -> list[Tensor]:
    """Output and the three gradients."""
    value, shapes, locations, weights = given
    leaves = [t.detach().requires_grad_() for t in (value, locations, weights)]
    output = sampling.ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2], impl=impl)
    if grad is None:
        grad = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]
