"""Random inputs of the operator, in its plain and its fused form, and one run of it."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.csrc import build
from pipeline.model.ops import sampling

SHAPES = [(6, 4), (3, 2), (1, 5), (1, 1)]
ODD_SIZES = [
    (1, SHAPES[:1], 1, 1),
    (2, SHAPES, 4, 2),
    (8, SHAPES[:3], 5, 1),
    (30, SHAPES[1:], 1, 3),
    (33, SHAPES[:1], 8, 1),
]
"""Channels, shapes, points and batch that fill no vector, no tile and no batch of points."""

Inputs = tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]
FusedInputs = tuple[Tensor, list[tuple[int, int]], Tensor, Tensor, Tensor]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Also the name of the implementation under test."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call."""

    batch: int = 2
    queries: int = 7
    heads: int = 3
    channels: int = 8
    points: int = 4
    shapes: Sequence[tuple[int, int]] = field(default_factory=lambda: SHAPES)


class Drawn:
    """Random numbers of fp64 for one call: `value`, `locations`, and more by `random`.

    Points lie up to two pixels off the map, and 0.05 pixels away from where the gradient jumps.
    """

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        seed += sizes.channels + 1000 * sizes.points + 7 * sizes.queries
        self._generator = torch.Generator().manual_seed(seed)
        self.sizes = sizes
        self.points = (sizes.batch, sizes.queries, sizes.heads, len(sizes.shapes), sizes.points)
        self.pixels = torch.tensor([[w, h] for h, w in sizes.shapes], dtype=torch.float64)[:, None]
        cell = (self.random(*self.points, 2) * (self.pixels + 4) - 2).floor()
        self.locations = (cell + 0.05 + 0.9 * self.random(*self.points, 2) + 0.5) / self.pixels
        pixels = sum(height * width for height, width in sizes.shapes)
        self.value = 2 * self.random(sizes.batch, pixels, sizes.heads, sizes.channels) - 1

    def random(self, *size: int) -> Tensor:
        """Numbers from 0 to 1."""
        return torch.rand(*size, generator=self._generator, dtype=torch.float64)


def inputs(device: str, *, dtype: torch.dtype = torch.float64, grad: bool = True, **sizes: Any) -> Inputs:
    """Value, shapes, locations and weights; `sizes` as in `Sizes`."""
    drawn = Drawn(Sizes(**sizes))
    real = real_type(dtype)
    tensors = drawn.value.to(dtype), drawn.locations.to(real), drawn.random(*drawn.points).to(real)
    value, locations, weights = (t.to(device).requires_grad_(grad) for t in tensors)
    return value, list(drawn.sizes.shapes), locations, weights


def fused_inputs(
    device: str, coordinates: int = 2, *, dtype: torch.dtype = torch.float64, grad: bool = False, **sizes: Any
) -> FusedInputs:
    """Value, shapes, reference points of 2 or 4 coordinates, offsets and logits; `sizes` as in `Sizes`."""
    drawn = Drawn(Sizes(**sizes), seed=coordinates)
    size = drawn.sizes
    references = 0.1 + 0.8 * drawn.random(size.batch, size.queries, len(size.shapes), coordinates)
    centres, extents = references[:, :, None, :, None, :2], references[:, :, None, :, None, 2:]
    step = 1 / drawn.pixels if coordinates == 2 else extents * 0.5 / max(size.points, 1)
    offsets = (drawn.locations - centres) / step
    logits = 6 * drawn.random(*drawn.points) - 3
    tensors = drawn.value.to(dtype), references.to(real_type(dtype)), offsets.to(dtype), logits.to(dtype)
    value, references, offsets, logits = (t.to(device).requires_grad_(grad) for t in tensors)
    return value, list(size.shapes), references, offsets, logits


def real_type(dtype: torch.dtype) -> torch.dtype:
    """The type of coordinates beside values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def double(given: Any) -> Any:
    """The same numbers as fp64."""
    return tuple(each.double() if isinstance(each, Tensor) else each for each in given)


def run(given: Inputs | FusedInputs, impl: str, grad: Tensor | None = None) -> list[Tensor]:
    """Output, and the gradient of each tensor, of the operator in the form that `given` has."""
    value, _, *rest = given
    leaves = [t.detach().requires_grad_() for t in (value, *rest)]
    output = call(given, leaves, impl)
    return [output.detach(), *torch.autograd.grad(output, leaves, slope(output) if grad is None else grad)]


def call(given: Inputs | FusedInputs, tensors: Sequence[Tensor], impl: str) -> Tensor:
    """The operator on these tensors, with the shapes and in the form of `given`."""
    operator: Any = sampling.ms_deform_attn if len(tensors) == 3 else sampling.ms_deform_attn_fused
    output: Tensor = operator(tensors[0], given[1], *tensors[1:], impl=impl)
    return output


def slope(output: Tensor) -> Tensor:
    """A gradient with a number of its own for each element."""
    return torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view(output.shape)


def assert_only_wanted_gradients(given: Inputs | FusedInputs, wanted: Sequence[bool], impl: str) -> None:
    """Each wanted gradient is that of `run`; the others are not computed."""
    value, _, *rest = given
    leaves = [t.detach().requires_grad_(want) for t, want in zip((value, *rest), wanted, strict=True)]
    output = call(given, leaves, impl)
    assert output.requires_grad == any(wanted)
    if any(wanted):
        output.backward(slope(output))
    for leaf, want, expected in zip(leaves, wanted, run(given, impl)[1:], strict=True):
        assert (leaf.grad is not None) == want
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected)


def assert_same_bits_on_threads(given: Inputs | FusedInputs, counts: Sequence[int]) -> None:
    """The CPU kernels give the same bits at each number of threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(run(given, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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
