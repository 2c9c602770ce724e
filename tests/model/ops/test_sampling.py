"""The operator against its definition: values, gradients, layouts, types, bad input, compilers."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from support.operator import (
    ODD_SIZES,
    SHAPES,
    Inputs,
    assert_only_wanted_gradients,
    assert_same_bits_on_threads,
    device,
    double,
    inputs,
    instruction_set,
    run,
)
from torch import Tensor

from pipeline.csrc import build
from pipeline.errors import OpError
from pipeline.model.ops import sampling

__all__ = ["device"]  # the fixture

FORWARD = "ms_deform_attn"


def test_reference_equals_definition() -> None:
    """Equation 3's inner sum, written as loops over single pixels."""
    value, shapes, locations, weights = inputs("cpu", batch=1, queries=3, heads=2, channels=2, points=2, grad=False)
    expected = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    starts = [0, *itertools.accumulate(h * w for h, w in shapes)]
    for q, m, level, p in itertools.product(range(3), range(2), range(len(shapes)), range(2)):
        height, width = shapes[level]
        x = locations[0, q, m, level, p, 0].item() * width - 0.5
        y = locations[0, q, m, level, p, 1].item() * height - 0.5
        for row, column in itertools.product(range(height), range(width)):
            near = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            pixel = value[0, starts[level] + row * width + column, m]
            expected[0, q, m] += weights[0, q, m, level, p] * near * pixel
    actual = sampling.ms_deform_attn(value, shapes, locations, weights, impl="torch")
    torch.testing.assert_close(actual, expected.flatten(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("channels", "shapes", "points", "batch"), [*ODD_SIZES, (71, SHAPES[2:], 3, 1)])
def test_sampling_gradients_equal_numerical_derivatives(
    device: str, channels: int, shapes: list[tuple[int, int]], points: int, batch: int
) -> None:
    given = inputs(device, batch=batch, queries=3, heads=2, channels=channels, points=points, shapes=shapes)

    def call(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return sampling.ms_deform_attn(value, shapes, locations, weights, impl=device)

    fast = channels > 2  # fast: directional derivatives instead of the whole Jacobian
    assert torch.autograd.gradcheck(call, (given[0], given[2], given[3]), nondet_tol=1e-12, fast_mode=fast)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 16, 30, 32, 33, 64, 71, 128, 1025])
@pytest.mark.parametrize("points", [1, 3, 4, 13])
def test_sampling_equals_grid_sample(device: str, channels: int, points: int) -> None:
    """13 points on 4 levels are more than one batch of the CPU kernel; 11 queries fill no tile."""
    given = inputs(device, queries=11 if channels < 100 else 3, channels=channels, points=points)
    for name, actual, expected in zip("ovlw", run(given, device), run(given, "torch"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_sampling_special_locations_equal_reference(device: str) -> None:
    """Borders, pixel centres, half a pixel outside, far locations; NaN and infinite locations give 0."""
    value, shapes, _, weights = inputs(device, shapes=[(5, 4)], channels=8, points=4)
    nan, inf = math.nan, math.inf
    grid = [0.0, 1.0, 0.5 / 4, 1.5 / 5, -0.5 / 4, 1 + 0.5 / 5, -1e4, 1e4, 1e30, -1e30, 1e300, nan, inf, -inf]
    pairs = torch.tensor(list(itertools.product(grid, grid)), dtype=torch.float64, device=device)
    special = pairs.repeat(2 * 3, 1).view(2, 3, 1, -1, 4, 2).permute(0, 3, 1, 2, 4, 5)
    repeated = weights[:, :1].expand(special.shape[:-1])
    output, grad_value, grad_locations, grad_weights = run((value, shapes, special, repeated), device)
    reference = run((value, shapes, special, repeated), "torch")
    torch.testing.assert_close(output, reference[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_value, reference[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_weights, reference[3], rtol=1e-12, atol=1e-12)
    assert grad_locations.isfinite().all()
    off = ~((special > -1).all(-1) & (special < 2).all(-1))  # NaN compares as off
    assert off.any()
    assert (grad_locations[off] == 0).all()
    assert (grad_weights[off] == 0).all()


def test_sampling_points_off_the_map_give_zero(device: str) -> None:
    value, shapes, locations, weights = inputs(device, grad=False)
    value.fill_(math.inf)
    locations.fill_(7.0)
    output, grad_value, grad_locations, grad_weights = run((value, shapes, locations, weights), device)
    for tensor in (output, grad_value, grad_locations, grad_weights):
        assert (tensor == 0).all()


def test_sampling_images_are_independent(device: str) -> None:
    """Image i is filled with i and all weights of a query sum to 1, so any other number is another image's."""
    value, shapes, locations, weights = inputs(
        device, batch=5, queries=13, channels=32, dtype=torch.float32, grad=False
    )
    value.copy_(torch.arange(5.0, device=device).view(5, 1, 1, 1).expand_as(value))
    locations.clamp_(0.5, 0.5)
    weights.div_(weights.sum((-2, -1), keepdim=True))
    output = sampling.ms_deform_attn(value, shapes, locations, weights, impl=device)
    torch.testing.assert_close(output, torch.arange(5.0, device=device).view(5, 1, 1).expand_as(output))


@pytest.mark.parametrize("layout", ["head_major", "sliced", "expanded", "misaligned"])
def test_sampling_any_memory_layout_gives_same_result(device: str, layout: str) -> None:
    value, shapes, locations, weights = inputs(device, channels=16, dtype=torch.float32, grad=False)
    if layout == "head_major":
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
        locations = locations.transpose(1, 2).contiguous().transpose(1, 2)
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":
        value = torch.cat([value, value + 1], -1)[..., :16]
    elif layout == "expanded":
        value = value[:1].expand_as(value)
    else:
        value = torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape)
        assert value.data_ptr() % 16
    grad = torch.ones((), device=device).expand(2, 7, 48)  # what sum().backward() hands over
    dense = (value.contiguous().clone(), shapes, locations.contiguous(), weights.contiguous())
    for actual, expected in zip(
        run((value, shapes, locations, weights), device, grad), run(dense, device, grad.contiguous()), strict=True
    ):
        torch.testing.assert_close(
            actual, expected, rtol=0 if device == "cpu" else 1e-5, atol=0 if device == "cpu" else 1e-5
        )


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"heads": 0}, {"channels": 0}])
def test_sampling_empty_tensors_give_zeros(device: str, empty: dict[str, int]) -> None:
    given = inputs(device, **empty)
    output, *grads = run(given, device)
    assert output.shape == (given[2].shape[0], given[2].shape[1], given[0].shape[2] * given[0].shape[3])
    assert (output == 0).all()
    for grad, tensor in zip(grads, (given[0], given[2], given[3]), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_sampling_backward_computes_only_wanted_gradients(device: str, wanted: tuple[bool, bool, bool]) -> None:
    assert_only_wanted_gradients(inputs(device), wanted, device)


def test_sampling_second_derivative_raises(device: str) -> None:
    value, shapes, locations, weights = inputs(device)
    output = sampling.ms_deform_attn(value, shapes, locations, weights, impl=device)
    (grad,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    with pytest.raises(OpError, match="impl='torch'"):
        grad.sum().backward()


@pytest.mark.parametrize("channels", [16, 32])
def test_sampling_float32_is_close_to_float64(device: str, channels: int) -> None:
    """Within 1e-5 of double, relative to the sum of magnitudes that each number is made of."""
    given = inputs(device, channels=channels, queries=50, dtype=torch.float32)
    exact = double(given)
    scale = run((exact[0].abs(), *exact[1:]), "torch")[0]
    actual, expected = run(given, device), run(exact, "torch")
    assert ((actual[0] - expected[0]).abs() <= 1e-5 * scale + 1e-6).all()
    for a, e in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("weights_dtype", ["same", "float32"])
def test_sampling_half_precision_sums_in_float32(
    device: str, dtype: torch.dtype, eps: float, weights_dtype: str
) -> None:
    """The fp32 result on the rounded inputs, rounded once: coordinates and sums are fp32."""
    value, shapes, locations, weights = inputs(device, channels=32, queries=200, dtype=dtype)
    weights = weights.to(dtype if weights_dtype == "same" else torch.float32)
    half = run((value, shapes, locations, weights), device, torch.ones(2, 200, 96, device=device, dtype=dtype))
    single = run((value.float(), shapes, locations, weights.float()), device, torch.ones(2, 200, 96, device=device))
    assert [t.dtype for t in half] == [dtype, dtype, torch.float32, weights.dtype]
    for h, s in zip(half, single, strict=True):
        assert (h.float() - s).abs().max() <= 1.01 * eps * s.abs().max()


def test_sampling_bfloat16_keeps_exact_locations(device: str) -> None:
    """Columns of 1, -1, 1, ... give a point's place back: within 0.05 pixels on a map 167 wide."""
    width = 167
    value = (1 - 2 * (torch.arange(width, device=device) % 2)).bfloat16().view(1, width, 1, 1).expand(1, width, 1, 8)
    x = torch.linspace(2, width - 3, 997, device=device)
    locations = torch.stack([(x + 0.5) / width, torch.full_like(x, 0.5)], -1).view(1, 997, 1, 1, 1, 2)
    weights = torch.ones(1, 997, 1, 1, 1, device=device, dtype=torch.bfloat16)
    output = sampling.ms_deform_attn(value, [(1, width)], locations, weights, impl=device)[0].float()
    expected = 1 - 2 * ((x + 1) % 2 - 1).abs()  # slope 2 per pixel
    assert ((output - expected[:, None]).abs() / 2 < 0.05).all()


def test_sampling_bits_do_not_depend_on_threads() -> None:
    given = inputs("cpu", channels=32, queries=300, dtype=torch.float32)
    assert_same_bits_on_threads(given, (1, 2, 3))


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_sampling_every_instruction_set_agrees(name: str) -> None:
    """Kernels that are not selected on this processor compute the same."""
    given = inputs("cpu", channels=47, points=13, dtype=torch.float32)
    exact = double(given)
    expected = run(given, "torch"), run(exact, "torch")
    with instruction_set(name):
        actual = run(given, "cpu"), run(exact, "cpu")
    for a, e, rtol in [
        *((a, e, 1e-4) for a, e in zip(actual[0], expected[0], strict=True)),
        *((a, e, 1e-12) for a, e in zip(actual[1], expected[1], strict=True)),
    ]:
        torch.testing.assert_close(a, e, rtol=rtol, atol=rtol)


# torch's own tracing looks at .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_sampling_opcheck_passes(device: str, dtype: torch.dtype, grad: bool) -> None:
    """Schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes."""
    value, shapes, locations, weights = inputs(device, queries=3, heads=2, dtype=dtype, shapes=SHAPES[:2], grad=grad)
    build.load(device)
    flat = [size for shape in shapes for size in shape]
    torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn, (value, locations, weights, flat))
    if not grad:
        arguments = (torch.ones(2, 3, 16, device=device, dtype=dtype), value, locations, weights, flat)
        for wanted in ([True, True, True], [False, True, False]):
            torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn_backward, (*arguments, wanted))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_sampling_compiles_without_graph_breaks(device: str, backend: str) -> None:
    def call(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return sampling.ms_deform_attn(value * 2, shapes, locations, weights.softmax(-1), impl="auto").relu()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for queries in (5, 9):
        value, shapes, locations, weights = inputs(device, queries=queries, dtype=torch.float32)
        results = []
        for function in (call, compiled):
            output = function(value, locations, weights)
            results.append([output, *torch.autograd.grad(output.sum(), (value, locations, weights))])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-5)


def replaced(given: Inputs, **change: object) -> dict[str, object]:
    names = ("value", "spatial_shapes", "sampling_locations", "attention_weights")
    return {**dict(zip(names, given, strict=True)), **change}


GOOD = inputs("cpu", dtype=torch.float32, grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": GOOD[0][0]}, r"value.*\[N, S, M, D\]"),
        ({"value": GOOD[0][:1]}, "value"),
        ({"value": GOOD[0][:, :, :2]}, "value"),
        ({"value": GOOD[0][:, 1:]}, "spatial_shapes.*35"),
        ({"spatial_shapes": SHAPES[:3]}, "spatial_shapes"),
        ({"spatial_shapes": [*SHAPES[:3], (0, 1)]}, "spatial_shapes"),
        ({"spatial_shapes": [*SHAPES[:2], (-1, -5), (1, 1)]}, "spatial_shapes"),
        ({"sampling_locations": GOOD[2][..., :1]}, r"\(x, y\)"),
        ({"attention_weights": GOOD[3][:, 1:]}, "attention_weights"),
        ({"sampling_locations": GOOD[2].bfloat16()}, "sampling_locations.*torch.float32.*bfloat16"),
        ({"sampling_locations": GOOD[2].double()}, "torch.float32"),
        ({"value": GOOD[0].double()}, "torch.float64"),
        ({"value": GOOD[0].int()}, "fp64, fp32"),
        ({"attention_weights": GOOD[3].bool()}, "fp64, fp32"),
        ({"value": GOOD[0].to("meta")}, "one device"),
        ({"impl": "cuda"}, "model.op=auto"),
        ({"impl": "gpu"}, "'gpu'"),
    ],
)
def test_sampling_bad_input_names_argument(change: dict[str, object], message: str) -> None:
    with pytest.raises(OpError, match=message):
        sampling.ms_deform_attn(**replaced(GOOD, **change))  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    "change",
    [
        {"value": GOOD[0][:, 1:]},
        {"value": GOOD[0][:1]},
        {"sampling_locations": GOOD[2][:, 1:]},
        {"sampling_locations": GOOD[2].double()},
        {"attention_weights": GOOD[3][..., :2]},
        {"spatial_shapes": SHAPES[:3]},
        {"spatial_shapes": [*SHAPES[:2], (2**31, 2**31), (1, 1)]},
    ],
)
def test_sampling_bad_input_is_refused_by_bare_operator(change: dict[str, object]) -> None:
    """A direct call of torch.ops raises an error instead of reading out of bounds."""
    build.load("cpu")
    value, shapes, locations, weights = replaced(GOOD, **change).values()
    flat = [size for shape in shapes for size in shape]  # type: ignore[attr-defined]  # a list of pairs
    with pytest.raises(RuntimeError, match=FORWARD):
        torch.ops.deformable_detr.ms_deform_attn(value, locations, weights, flat)


def test_choose_auto_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(device: str) -> Path:
        raise OpError("there is nothing to build it with: install g++")

    monkeypatch.setattr(build, "load", broken)
    sampling._choose.cache_clear()
    try:
        for _ in range(3):
            sampling.ms_deform_attn(*GOOD)
        warnings = [record for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == 1
        assert "install g++" in warnings[0].message
        with pytest.raises(OpError, match="install g"):
            sampling.ms_deform_attn(*GOOD, impl="cpu")
    finally:
        sampling._choose.cache_clear()
