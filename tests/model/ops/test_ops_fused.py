"""The fused operator equals its composition from softmax, locations and grid_sample."""

import itertools
import math

import pytest
import torch
from support.operator import ODD_SIZES, SHAPES, FusedInputs, assert_only_wanted_gradients, device, fused_inputs, run
from torch import Tensor

from pipeline.errors import OpError
from pipeline.model.ops import sampling

__all__ = ["device"]  # the fixture


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(("channels", "shapes", "points", "batch"), [*ODD_SIZES, (16, SHAPES, 9, 1)])
def test_fused_gradients_equal_numerical_derivatives(
    device: str, coordinates: int, channels: int, shapes: list[tuple[int, int]], points: int, batch: int
) -> None:
    given = fused_inputs(
        device, coordinates, batch=batch, queries=3, heads=2, channels=channels, points=points, shapes=shapes, grad=True
    )

    def call(value: Tensor, *rest: Tensor) -> Tensor:
        return sampling.ms_deform_attn_fused(value, shapes, *rest, impl=device)

    fast = channels > 2  # fast: directional derivatives instead of the whole Jacobian
    assert torch.autograd.gradcheck(call, (given[0], *given[2:]), nondet_tol=1e-12, fast_mode=fast)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("channels", [1, 3, 8, 16, 32, 33, 64, 71, 128, 1025])
@pytest.mark.parametrize("points", [1, 3, 4, 13])
def test_fused_any_size_equals_composition(device: str, coordinates: int, channels: int, points: int) -> None:
    """13 points on 4 levels are more than one batch of the CPU kernel; 11 queries fill no tile."""
    given = fused_inputs(device, coordinates, queries=11 if channels < 100 else 3, channels=channels, points=points)
    for name, actual, expected in zip("ovrol", run(given, device), run(given, "torch"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_fused_locations_at_edges_equal_composition(device: str) -> None:
    """Borders, far locations, NaN and infinity from any input: off the map they give 0 and have no gradient."""
    special = [0.0, 1.0, -0.5, 2.5, -1e4, 1e30, math.nan, math.inf, -math.inf]
    pairs = torch.tensor(list(itertools.product(special, special)), dtype=torch.float64, device=device)
    count = len(pairs)
    for coordinates in (2, 4):
        value, shapes, references, offsets, logits = fused_inputs(
            device, coordinates, batch=1, queries=2 * count, shapes=[(5, 4)], points=2
        )
        references[0, :count, 0, :2] = pairs
        if coordinates == 4:
            references[0, :count, 0, 2:] = pairs
        offsets[0, count:, :, 0, 0] = pairs[:, None]
        output, grad_value, grad_references, grad_offsets, grad_logits = run(
            (value, shapes, references, offsets, logits), device
        )
        locations = sampling.locate(references, offsets, shapes)
        weights = logits.flatten(-2).softmax(-1).view(logits.shape)
        expected = sampling.ms_deform_attn(value, shapes, locations, weights, impl="torch")
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        for grad in (grad_value, grad_references, grad_offsets, grad_logits):
            assert grad.isfinite().all()
        off = ~((locations > -1).all(-1) & (locations < 2).all(-1))  # NaN compares as off
        assert off.any()
        assert (grad_offsets[off] == 0).all()


def test_fused_points_off_the_map_give_zero(device: str) -> None:
    value, shapes, references, offsets, logits = fused_inputs(device)
    for tensor in run((value.fill_(math.inf), shapes, references, offsets.fill_(1e4), logits), device):
        assert (tensor == 0).all()


@pytest.mark.parametrize("kind", ["far apart", "minus infinity", "nan", "infinity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_special_logits_equal_softmax(device: str, kind: str, dtype: torch.dtype) -> None:
    """As torch's softmax has it: minus infinity is weight 0; NaN and infinity make their own query NaN, no other."""
    value, shapes, references, offsets, logits = fused_inputs(device, dtype=dtype)
    offsets.zero_()
    references.fill_(0.5)
    if kind == "far apart":
        logits.copy_(torch.linspace(-300, 300, logits.numel(), dtype=dtype, device=device).view_as(logits).sin() * 150)
    else:
        logits[0, 2, 1, 0, 3] = {"minus infinity": -math.inf, "nan": math.nan, "infinity": math.inf}[kind]
    given = (value, shapes, references, offsets, logits)
    rtol = 1e-11 if dtype == torch.float64 else 1e-4
    for actual, expected in zip(run(given, device), run(given, "torch"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol, equal_nan=True)


def test_fused_images_are_independent(device: str) -> None:
    """Image i is filled with i and the weights of a query sum to 1, so any other number is another image's."""
    value, shapes, references, offsets, logits = fused_inputs(
        device, batch=5, queries=13, channels=32, dtype=torch.float32
    )
    value.copy_(torch.arange(5.0, device=device).view(5, 1, 1, 1).expand_as(value))
    given = (value, shapes, references.fill_(0.5), offsets.zero_(), logits)
    output = sampling.ms_deform_attn_fused(*given, impl=device)
    torch.testing.assert_close(output, torch.arange(5.0, device=device).view(5, 1, 1).expand_as(output))


@pytest.mark.parametrize("layout", ["head_major", "sliced", "expanded", "misaligned"])
def test_fused_any_memory_layout_gives_same_result(device: str, layout: str) -> None:
    value, shapes, references, offsets, logits = fused_inputs(device, 4, channels=16, dtype=torch.float32)
    if layout == "head_major":
        value, offsets, logits = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (value, offsets, logits))
        references = references.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":
        both = torch.cat([offsets.flatten(3), logits.flatten(3)], -1)  # one projection for both
        offsets, logits = both[..., :32].view(offsets.shape), both[..., 32:].view(logits.shape)
    elif layout == "expanded":
        value, references = value[:1].expand_as(value), references[:, :, :1].expand_as(references)
    else:
        value, offsets = (torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (value, offsets))
        assert value.data_ptr() % 16
    grad = torch.ones((), device=device).expand(2, 7, 48)  # what sum().backward() hands over
    given = (value, shapes, references, offsets, logits)
    dense: FusedInputs = (value.clone().contiguous(), shapes, *(t.clone().contiguous() for t in given[2:]))  # type: ignore[assignment]  # three tensors
    tolerance = 0 if device == "cpu" else 1e-5
    for actual, expected in zip(run(given, device, grad), run(dense, device, grad.contiguous()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"heads": 0}, {"channels": 0}])
def test_fused_empty_tensors_give_zeros(device: str, empty: dict[str, int]) -> None:
    given = fused_inputs(device, **empty)
    output, *grads = run(given, device)
    assert output.shape == (given[3].shape[0], given[3].shape[1], given[0].shape[2] * given[0].shape[3])
    assert (output == 0).all()
    for grad, tensor in zip(grads, (given[0], *given[2:]), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=4)))
def test_fused_backward_computes_only_wanted_gradients(device: str, wanted: tuple[bool, ...]) -> None:
    assert_only_wanted_gradients(fused_inputs(device, 4), wanted, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_forward_saves_only_inputs(device: str, dtype: torch.dtype) -> None:
    """No sampled tensor, no locations, no softmax: the backward has what the caller has already."""
    value, shapes, *rest = fused_inputs(device, dtype=dtype, grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sampling.ms_deform_attn_fused(value, shapes, *rest, impl=device)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (value, *rest)]
    assert [t.dtype for t in kept] == [dtype, torch.float32, dtype, dtype]


def test_fused_second_derivative_raises(device: str) -> None:
    value, shapes, *rest = fused_inputs(device, grad=True)
    output = sampling.ms_deform_attn_fused(value, shapes, *rest, impl=device)
    (grad,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    with pytest.raises(OpError, match="impl='torch'"):
        grad.sum().backward()


def test_fused_library_without_kernel_is_composed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = fused_inputs(device, 4)
    expected = run(given, device)
    monkeypatch.setattr(sampling, "has_fused_kernel", lambda implementation: False)
    for a, e in zip(run(given, device), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
