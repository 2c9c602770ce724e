"""MSDeformAttn against a loop over queries, heads, levels and points, and its initialisation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model.attention import MSDeformAttn
from pipeline.model.position import Pyramid

DIM, HEADS, LEVELS, POINTS = 8, 2, 2, 3


@pytest.fixture
def pyramid() -> Pyramid:
    masks = [torch.zeros(2, 4, 5, dtype=torch.bool), torch.zeros(2, 2, 3, dtype=torch.bool)]
    for mask, columns in zip(masks, (2, 1), strict=True):
        mask[1, :, -columns:] = True
    return Pyramid.of(masks)


@pytest.fixture
def attention() -> MSDeformAttn:
    torch.manual_seed(0)
    module = MSDeformAttn(DIM, HEADS, LEVELS, POINTS, impl="torch")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def bilinear(image: Tensor, x: float, y: float) -> Tensor:
    """Value [C] of an image [H, W, C] at a pixel position, zero outside."""
    total = torch.zeros(image.shape[2])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
    return total


def by_loops(m: MSDeformAttn, query: Tensor, references: Tensor, tokens: Tensor, pyramid: Pyramid) -> Tensor:
    values = m.value_proj(tokens)
    values[pyramid.padding] = 0
    offsets = m.sampling_offsets(query).view(*query.shape[:2], HEADS, LEVELS, POINTS, 2)
    weights = m.attention_weights(query).view(*query.shape[:2], HEADS, LEVELS * POINTS).softmax(-1)
    result = torch.zeros(*query.shape[:2], HEADS, DIM // HEADS)
    for n, q, h in torch.cartesian_prod(*(torch.arange(s) for s in (*query.shape[:2], HEADS))).tolist():
        start = 0
        for level, (height, width) in enumerate(pyramid.shapes):
            image = values[n, start : start + height * width].view(height, width, HEADS, -1)[:, :, h]
            start += height * width
            for point in range(POINTS):
                offset, reference = offsets[n, q, h, level, point], references[n, q, level]
                if len(reference) == 2:
                    x, y = (reference + offset / torch.tensor([width, height])).tolist()
                else:
                    x, y = (reference[:2] + offset / POINTS * reference[2:] / 2).tolist()
                weight = weights[n, q, h, level * POINTS + point]
                result[n, q, h] += weight * bilinear(image, x * width - 0.5, y * height - 0.5)
    return m.output_proj(result.flatten(2))


@pytest.mark.parametrize("coordinates", [2, 4])
@torch.no_grad()
def test_attention_equals_equation(attention: MSDeformAttn, pyramid: Pyramid, coordinates: int) -> None:
    query, tokens = torch.randn(2, 4, DIM), torch.randn(2, pyramid.tokens, DIM)
    references = torch.rand(2, 4, LEVELS, coordinates)
    expected = by_loops(attention, query, references, tokens, pyramid)
    torch.testing.assert_close(attention(query, references, tokens, pyramid), expected, rtol=1e-4, atol=1e-5)


def test_attention_ignores_padding(attention: MSDeformAttn, pyramid: Pyramid) -> None:
    query, tokens, references = torch.randn(2, 4, DIM), torch.randn(2, 26, DIM), torch.rand(2, 4, LEVELS, 2)
    changed = tokens.masked_fill(pyramid.padding[..., None], 1e3)
    torch.testing.assert_close(
        attention(query, references, changed, pyramid), attention(query, references, tokens, pyramid)
    )


def test_attention_one_point_per_head_equals_convolution() -> None:
    """With K = 1, one level and W' the identity, the heads are the taps of a (deformable) convolution."""
    torch.manual_seed(1)
    m = MSDeformAttn(32, heads=8, levels=1, points=1, impl="torch")
    torch.nn.init.eye_(m.value_proj.weight)
    image, ring = torch.randn(1, 32, 6, 7), m.sampling_offsets.bias.detach().view(8, 2).round().long()
    kernel = torch.zeros(32, 32, 3, 3)
    for head, (x, y) in enumerate(ring.tolist()):
        part = slice(4 * head, 4 * head + 4)
        kernel[:, part, 1 + y, 1 + x] = m.output_proj.weight[:, part]
    tokens = image.flatten(2).transpose(1, 2)
    pyramid = Pyramid.of([torch.zeros(1, 6, 7, dtype=torch.bool)])
    output = m(tokens, pyramid.on_levels(pyramid.centres()), tokens, pyramid)
    expected = torch.nn.functional.conv2d(image, kernel, padding=1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_attention_initial_points_lie_on_square_rings() -> None:
    m = MSDeformAttn(256, 8, 4, 4)
    bias = m.sampling_offsets.bias.detach().view(8, 4, 4, 2)
    ring = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for level in range(4):
        for point in range(4):
            torch.testing.assert_close(bias[:, level, point], torch.tensor(ring) * float(point + 1))
    for zero in (m.sampling_offsets.weight, m.attention_weights.weight, m.attention_weights.bias):
        assert not zero.any()
    for projection in (m.value_proj, m.output_proj):
        assert not projection.bias.any()
        assert projection.weight.abs().max() <= math.sqrt(6 / 512)


def test_attention_autocast_keeps_locations_float32(attention: MSDeformAttn, pyramid: Pyramid) -> None:
    query, tokens, references = torch.randn(2, 4, DIM), torch.randn(2, 26, DIM), torch.rand(2, 4, LEVELS, 2)
    exact = attention(query, references, tokens, pyramid)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(query, references, tokens, pyramid)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.2)


class Operands(TorchDispatchMode):
    """The tensors that operators of this project are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("deformable_detr."):
            self.seen.append([arg for arg in args if isinstance(arg, Tensor)])
        return func(*args, **(kwargs or {}))


def test_attention_bfloat16_has_no_absolute_coordinates() -> None:
    """Under autocast the op gets bf16 value, offsets and logits, but float32 references, and its backward too.

    A column of pixels 1, -1, 1, ... then gives the sampled place back to 0.02 pixels on a map 167 wide, where a bf16
    coordinate would be off by up to 0.33.
    """
    width = 167
    m = MSDeformAttn(8, heads=1, levels=1, points=1, impl="cpu")
    torch.nn.init.zeros_(m.sampling_offsets.bias)
    for projection in (m.value_proj, m.output_proj):
        torch.nn.init.eye_(projection.weight)
    pyramid = Pyramid.of([torch.zeros(1, 1, width, dtype=torch.bool)])
    tokens = (1 - 2 * (torch.arange(width) % 2)).float()[None, :, None].expand(1, width, 8)
    x = torch.linspace(2, width - 3, 499)
    references = torch.stack([(x + 0.5) / width, torch.full_like(x, 0.5)], -1)[None, :, None].requires_grad_()
    query = torch.zeros(1, 499, 8, requires_grad=True)
    with Operands() as operands:
        with torch.autocast("cpu", torch.bfloat16):
            output = m(query, references, tokens, pyramid)
        output.sum().backward()
    expected = 1 - 2 * ((x + 1) % 2 - 1).abs()  # slope 2 per pixel
    assert ((output[0].float() - expected[:, None]).abs() / 2 < 0.02).all()
    value, points, offsets, logits = operands.seen[0]
    assert [t.dtype for t in (value, points, offsets, logits)] == [torch.bfloat16, torch.float32, *2 * [torch.bfloat16]]
    assert [t.dtype for t in operands.seen[1][1:]] == [torch.bfloat16, torch.float32, *2 * [torch.bfloat16]]
    assert references.grad is not None
    assert references.grad.dtype == torch.float32


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_operator_equals_composition(attention: MSDeformAttn, pyramid: Pyramid, coordinates: int) -> None:
    """Output and every gradient with kernels and with plain torch."""
    query, tokens = torch.randn(2, 4, DIM, requires_grad=True), torch.randn(2, 26, DIM, requires_grad=True)
    references = torch.rand(2, 4, LEVELS, coordinates, requires_grad=True)
    leaves = (query, tokens, references, *attention.parameters())
    results = []
    for impl in ("torch", "cpu"):
        attention.impl = impl
        output = attention(query, references, tokens, pyramid)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
