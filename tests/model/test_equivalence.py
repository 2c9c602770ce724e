"""The two limits of deformable attention (arXiv 2010.04159, section 4.1) in fp64, gradients included, to 1e-10.

One point per head and an identity W' make it deformable convolution (arXiv 1703.06211); a point on every pixel makes it
the softmax attention of the Transformer.
"""

import math

import pytest
import torch
from support.operator import device
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torchvision.ops import deform_conv2d

from pipeline.model.attention import MSDeformAttn
from pipeline.model.ops import sampling
from pipeline.model.position import Pyramid

__all__ = ["device"]  # the fixture

BATCH, HEIGHT, WIDTH = 2, 4, 8  # powers of two, so that the float32 centres of pixels are exact


@pytest.fixture(params=["torch", "kernel"])
def impl(request: pytest.FixtureRequest, device: str) -> str:
    return device if request.param == "kernel" else "torch"


def random(*size: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(device).requires_grad_()


def geometry(device: str) -> tuple[Pyramid, Tensor]:
    """One level without padding, and the centre of every pixel as reference [N, H * W, 1, 2]."""
    pyramid = Pyramid.of([torch.zeros(BATCH, HEIGHT, WIDTH, dtype=torch.bool, device=device)])
    return pyramid, pyramid.on_levels(pyramid.centres()).double()


def equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def results(output: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output and a gradient for each leaf."""
    grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
    return output, *torch.autograd.grad(output, leaves, grad)


def deformable_convolution(image: Tensor, shifts: Tensor, weight: Tensor) -> Tensor:
    """A 3x3 one; shifts [N, H * W, 9, 2] (x, y) -> [N, H * W, C_out]."""
    offset = shifts.flip(-1).flatten(2).transpose(1, 2).reshape(BATCH, 18, HEIGHT, WIDTH)  # torchvision: (y, x)
    return deform_conv2d(image, offset, weight, padding=1).flatten(2).transpose(1, 2)


TAPS = [(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)]


def test_operator_one_point_equals_deformable_convolution(device: str, impl: str) -> None:
    """Nine heads that see all channels unchanged (W' = 1) are the nine taps of a 3x3 kernel; A = 1 by the softmax."""
    channels, outputs = 5, 6
    image = random(BATCH, channels, HEIGHT, WIDTH, device=device, seed=1)
    shifts = random(BATCH, HEIGHT * WIDTH, 9, 2, device=device, seed=2)
    weight = random(outputs, channels, 3, 3, device=device, seed=3)
    leaves = (image, shifts, weight)
    value = image.flatten(2).transpose(1, 2)[:, :, None].expand(-1, -1, 9, -1)
    offsets = (shifts + torch.tensor(TAPS, dtype=torch.float64, device=device))[:, :, :, None, None]
    logits = random(BATCH, HEIGHT * WIDTH, 9, 1, 1, device=device, seed=4)
    _, references = geometry(device)
    sampled = sampling.ms_deform_attn_fused(value, [(HEIGHT, WIDTH)], references, offsets, logits, impl=impl)
    output = sampled @ weight.permute(0, 2, 3, 1).flatten(1).T
    equal(results(output, leaves), results(deformable_convolution(image, shifts, weight), leaves))


def test_attention_one_point_equals_deformable_convolution(device: str, impl: str) -> None:
    """The module's heads share the channels out, so tap k of the convolution sees the channels of head k."""
    torch.manual_seed(0)
    part = 2
    module = MSDeformAttn(9 * part, heads=9, levels=1, points=1, impl=impl).double().to(device)
    torch.nn.init.eye_(module.value_proj.weight)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.5)
    torch.nn.init.normal_(module.output_proj.bias)
    query = random(BATCH, HEIGHT * WIDTH, 9 * part, device=device, seed=5)
    image = random(BATCH, 9 * part, HEIGHT, WIDTH, device=device, seed=6)
    leaves = (query, image, module.sampling_offsets.weight, module.output_proj.weight)
    pyramid, references = geometry(device)
    output = module(query, references, image.flatten(2).transpose(1, 2), pyramid)
    of_tap = torch.eye(9, dtype=torch.float64, device=device).repeat_interleave(part, 0).view(9 * part, 3, 3)
    weight = module.output_proj.weight[:, :, None, None] * of_tap
    taps = torch.tensor(TAPS, dtype=torch.float64, device=device)
    shifts = module.sampling_offsets(query).view(BATCH, -1, 9, 2) - taps  # the kernel's own places are its taps
    expected = deformable_convolution(image, shifts, weight) + module.output_proj.bias
    equal(results(output, leaves), results(expected, leaves))


def every_pixel(references: Tensor) -> Tensor:
    """Offsets [N, Q, H * W, 2], in pixels, from each query's reference to all pixels."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    pixels = torch.stack([x, y], -1).flatten(0, 1).to(references)
    extent = torch.tensor([WIDTH, HEIGHT]).to(references)
    return pixels - (references * extent - 0.5)


def test_operator_point_on_every_pixel_equals_softmax_attention(device: str, impl: str) -> None:
    heads, channels = 3, 4
    query, key, value = (
        random(BATCH, HEIGHT * WIDTH, heads, channels, device=device, seed=seed).mul(2).detach().requires_grad_()
        for seed in (7, 8, 9)
    )
    _, references = geometry(device)
    offsets = every_pixel(references)[:, :, None, None].expand(-1, -1, heads, -1, -1, -1)
    logits = torch.einsum("nqmd,nkmd->nqmk", query, key)[:, :, :, None] / math.sqrt(channels)
    output = sampling.ms_deform_attn_fused(value, [(HEIGHT, WIDTH)], references, offsets, logits, impl=impl)
    dense = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
    leaves = (query, key, value)
    equal(results(output, leaves), results(dense.transpose(1, 2).flatten(2), leaves))


def test_attention_point_on_every_pixel_equals_softmax_attention(device: str, impl: str) -> None:
    """All queries refer to one place, so constant offsets reach every pixel; the logits' weight holds the keys."""
    torch.manual_seed(1)
    heads, part, pixels = 2, 3, HEIGHT * WIDTH
    module = MSDeformAttn(heads * part, heads, levels=1, points=pixels, impl=impl).double().to(device)
    pyramid, _ = geometry(device)
    queries = 5
    references = torch.tensor([0.25, 0.75], dtype=torch.float64, device=device).expand(BATCH, queries, 1, 2)
    torch.nn.init.normal_(module.attention_weights.weight)
    with torch.no_grad():
        module.sampling_offsets.bias.copy_(every_pixel(references)[0, 0].flatten().repeat(heads))
    query = random(BATCH, queries, heads * part, device=device, seed=10)
    tokens = random(BATCH, pixels, heads * part, device=device, seed=11)
    keys = module.attention_weights.weight
    leaves = (query, tokens, keys, module.value_proj.weight, module.output_proj.weight)
    output = module(query, references, tokens, pyramid)
    values = module.value_proj(tokens).view(BATCH, pixels, heads, part).transpose(1, 2)
    dense = scaled_dot_product_attention(
        query[:, None].expand(-1, heads, -1, -1),
        keys.view(1, heads, pixels, -1).expand(BATCH, -1, -1, -1),
        values,
        scale=1.0,
    )
    expected = module.output_proj(dense.transpose(1, 2).flatten(2))
    equal(results(output, leaves), results(expected, leaves))
