"""Inputs of the fused operator, and its output and gradients."""

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from pipeline.csrc import build
from pipeline.model.ops import sampling
from support.operator import SHAPES

Inputs = tuple[Tensor, list[tuple[int, int]], Tensor, Tensor, Tensor]


def inputs(
    device: str,
    coordinates: int = 2,
    *,
    batch: int = 2,
    queries: int = 7,
    heads: int = 3,
    channels: int = 8,
    points: int = 4,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
) -> Inputs:
    """Random tensors. Points lie up to two pixels off the map, and 0.05 pixels away from where the gradient jumps."""
    generator = torch.Generator().manual_seed(channels + 1000 * points + 7 * queries + coordinates)
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    size = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64)[:, None]
    outer = (batch, queries, heads, len(shapes), points)
    cell = (random(*outer, 2) * (size + 4) - 2).floor()
    locations = (cell + 0.05 + 0.9 * random(*outer, 2) + 0.5) / size
    references = 0.1 + 0.8 * random(batch, queries, len(shapes), coordinates)
    step = 1 / size if coordinates == 2 else references[:, :, None, :, None, 2:] * 0.5 / max(points, 1)
    offsets = (locations - references[:, :, None, :, None, :2]) / step
    value = 2 * random(batch, sum(h * w for h, w in shapes), heads, channels) - 1
    logits = 6 * random(*outer) - 3
    tensors = [value.to(dtype), references.to(real), offsets.to(dtype), logits.to(dtype)]
    value, references, offsets, logits = (t.to(device).requires_grad_(grad) for t in tensors)
    return value, list(shapes), references, offsets, logits


def run(given: Inputs, impl: str, grad: Tensor | None = None) -> list[Tensor]:
    """Output and the four gradients."""
    value, shapes, *rest = given
    leaves = [t.detach().requires_grad_() for t in (value, *rest)]
    output = sampling.ms_deform_attn_fused(leaves[0], shapes, *leaves[1:], impl=impl)
    if grad is None:
        grad = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def double(given: Inputs) -> Inputs:
    value, shapes, references, offsets, logits = given
    return value.double(), shapes, references.double(), offsets.double(), logits.double()


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The CPU kernels of this name; skips where the processor cannot run them."""
    best = build.instruction_set()
    try:
        if build.instruction_set(name) != name:
            pytest.skip(f"this processor has no {name}")
        yield
    finally:
        build.instruction_set(best)
