"""The fused operator in every type, instruction set and number of threads."""

import pytest
import torch
from support.operator import assert_same_bits_on_threads, device, double, fused_inputs, instruction_set, run

from pipeline.model.ops import sampling

__all__ = ["device"]  # the fixture


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("channels", [16, 32])
def test_fused_float32_is_close_to_float64(device: str, coordinates: int, channels: int) -> None:
    """Within 1e-5 of double, relative to the sum of magnitudes that each number is made of."""
    given = fused_inputs(device, coordinates, channels=channels, queries=50, dtype=torch.float32)
    exact = double(given)
    scale = run((exact[0].abs(), *exact[1:]), "torch")[0]
    actual, expected = run(given, device), run(exact, "torch")
    assert ((actual[0] - expected[0]).abs() <= 1e-5 * scale + 1e-6).all()
    for a, e in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=2e-5 * float(e.abs().max()))


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("offsets_dtype", ["same", "float32"])
def test_fused_half_precision_sums_in_float32(device: str, dtype: torch.dtype, eps: float, offsets_dtype: str) -> None:
    """The fp32 result on the rounded inputs, rounded once: softmax, coordinates and sums are fp32."""
    value, shapes, references, offsets, logits = fused_inputs(device, channels=32, queries=200, dtype=dtype)
    if offsets_dtype == "float32":
        offsets, logits = offsets.float(), logits.float()
    half = run((value, shapes, references, offsets, logits), device, torch.ones(2, 200, 96, device=device, dtype=dtype))
    widened = (value.float(), shapes, references, offsets.float(), logits.float())
    single = run(widened, device, torch.ones(2, 200, 96, device=device))
    assert [t.dtype for t in half] == [dtype, dtype, torch.float32, offsets.dtype, logits.dtype]
    for h, s in zip(half, single, strict=True):
        assert (h.float() - s).abs().max() <= 1.01 * eps * s.abs().max()


def test_fused_bfloat16_keeps_exact_locations(device: str) -> None:
    """Columns of 1, -1, 1, ... give a point's place back: offsets up to 8 pixels stay within 0.02 on a map 167 wide."""
    width = 167
    value = (1 - 2 * (torch.arange(width, device=device) % 2)).bfloat16().view(1, width, 1, 1).expand(1, width, 1, 8)
    x = torch.linspace(10, width - 11, 997, device=device)
    offsets = torch.zeros(1, 997, 1, 1, 1, 2, device=device)
    offsets[0, :, 0, 0, 0, 0] = torch.linspace(-8, 8, 997, device=device).roll(313)
    references = torch.stack([(x + 0.5) / width, torch.full_like(x, 0.5)], -1).view(1, 997, 1, 2)
    logits = torch.zeros(1, 997, 1, 1, 1, device=device, dtype=torch.bfloat16)
    output = sampling.ms_deform_attn_fused(value, [(1, width)], references, offsets.bfloat16(), logits, impl=device)
    expected = 1 - 2 * ((x + offsets[0, :, 0, 0, 0, 0] + 1) % 2 - 1).abs()  # slope 2 per pixel
    error = (output[0].float() - expected[:, None]).abs() / 2
    assert (error < 0.02).all()


def test_fused_bits_do_not_depend_on_threads() -> None:
    """12 threads are more than images times heads, so the backward makes two passes."""
    given = fused_inputs("cpu", 4, channels=32, queries=300, dtype=torch.float32)
    assert_same_bits_on_threads(given, (1, 2, 12))


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_fused_every_instruction_set_agrees(name: str, coordinates: int) -> None:
    """Kernels that are not selected on this processor compute the same."""
    given = fused_inputs("cpu", coordinates, channels=47, points=13, dtype=torch.float32)
    exact = double(given)
    expected = run(exact, "torch")
    with instruction_set(name):
        actual = run(given, "cpu"), run(exact, "cpu")
    for results, rtol in zip(actual, (1e-4, 1e-12), strict=True):
        for a, e in zip(results, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=rtol, atol=rtol * max(1.0, float(e.abs().max())))


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_fused_gradients_keep_bits_without_gradient_of_references(name: str, coordinates: int) -> None:
    """An encoder does not need this gradient: its reference points do not depend on a weight."""
    value, shapes, references, *rest = given = fused_inputs(
        "cpu", coordinates, channels=32, queries=300, dtype=torch.float32
    )
    leaves = [t.detach().requires_grad_() for t in (value, *rest)]
    with instruction_set(name):
        output = run(given, "cpu")[0]
        actual = sampling.ms_deform_attn_fused(leaves[0], shapes, references, *leaves[1:], impl="cpu")
        actual.backward(output)
        expected = run(given, "cpu", output)[1:]
    for leaf, gradient in zip(leaves, (expected[0], *expected[2:]), strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)
