"""The fused operator against its composition from softmax, locations and grid_sample; types, bad input, compilers."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from support.operator import SHAPES, device
from torch import Tensor

from pipeline.csrc import build
from pipeline.errors import OpError
from pipeline.model.ops import sampling

__all__ = ["device"]  # the fixture

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


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(
    ("channels", "shapes", "points", "batch"),
    [
        (1, SHAPES[:1], 1, 1),
        (2, SHAPES, 4, 2),
        (8, SHAPES[:3], 5, 1),
        (30, SHAPES[1:], 1, 3),
        (33, SHAPES[:1], 8, 1),
        (16, SHAPES, 9, 1),
    ],
)
def test_gradients_are_the_derivatives(
    device: str, coordinates: int, channels: int, shapes: list[tuple[int, int]], points: int, batch: int
) -> None:
    given = inputs(
        device, coordinates, batch=batch, queries=3, heads=2, channels=channels, points=points, shapes=shapes, grad=True
    )

    def call(value: Tensor, *rest: Tensor) -> Tensor:
        return sampling.ms_deform_attn_fused(value, shapes, *rest, impl=device)

    fast = channels > 2  # fast: directional derivatives instead of the whole Jacobian
    assert torch.autograd.gradcheck(call, (given[0], *given[2:]), nondet_tol=1e-12, fast_mode=fast)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("channels", [1, 3, 8, 16, 32, 33, 64, 71, 128, 1025])
@pytest.mark.parametrize("points", [1, 3, 4, 13])
def test_equals_the_composition(device: str, coordinates: int, channels: int, points: int) -> None:
    """13 points on 4 levels are more than one batch of the CPU kernel; 11 queries fill no tile."""
    given = inputs(device, coordinates, queries=11 if channels < 100 else 3, channels=channels, points=points)
    for name, actual, expected in zip("ovrol", run(given, device), run(given, "torch"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_special_places(device: str) -> None:
    """The borders, far away, and what is no number: wherever it comes from, it counts nothing and has no gradient."""
    special = [0.0, 1.0, -0.5, 2.5, -1e4, 1e30, math.nan, math.inf, -math.inf]
    pairs = torch.tensor(list(itertools.product(special, special)), dtype=torch.float64, device=device)
    count = len(pairs)
    for coordinates in (2, 4):
        value, shapes, references, offsets, logits = inputs(
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


def test_points_off_the_map_do_not_read_it(device: str) -> None:
    value, shapes, references, offsets, logits = inputs(device)
    for tensor in run((value.fill_(math.inf), shapes, references, offsets.fill_(1e4), logits), device):
        assert (tensor == 0).all()


@pytest.mark.parametrize("kind", ["far apart", "minus infinity", "nan", "infinity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_logits(device: str, kind: str, dtype: torch.dtype) -> None:
    """As torch's softmax has it: minus infinity is weight 0; NaN and infinity make their own query NaN, no other."""
    value, shapes, references, offsets, logits = inputs(device, dtype=dtype)
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


def test_images_do_not_mix(device: str) -> None:
    """Image i is filled with i and the weights of a query sum to 1, so any other number is another image's."""
    value, shapes, references, offsets, logits = inputs(device, batch=5, queries=13, channels=32, dtype=torch.float32)
    value.copy_(torch.arange(5.0, device=device).view(5, 1, 1, 1).expand_as(value))
    given = (value, shapes, references.fill_(0.5), offsets.zero_(), logits)
    output = sampling.ms_deform_attn_fused(*given, impl=device)
    torch.testing.assert_close(output, torch.arange(5.0, device=device).view(5, 1, 1).expand_as(output))


@pytest.mark.parametrize("layout", ["head_major", "sliced", "expanded", "misaligned"])
def test_layouts(device: str, layout: str) -> None:
    value, shapes, references, offsets, logits = inputs(device, 4, channels=16, dtype=torch.float32)
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
    dense: Inputs = (value.clone().contiguous(), shapes, *(t.clone().contiguous() for t in given[2:]))  # type: ignore[assignment]  # three tensors
    tolerance = 0 if device == "cpu" else 1e-5
    for actual, expected in zip(run(given, device, grad), run(dense, device, grad.contiguous()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"heads": 0}, {"channels": 0}])
def test_empty(device: str, empty: dict[str, int]) -> None:
    given = inputs(device, **empty)  # type: ignore[arg-type]  # sizes only
    output, *grads = run(given, device)
    assert output.shape == (given[3].shape[0], given[3].shape[1], given[0].shape[2] * given[0].shape[3])
    assert (output == 0).all()
    for grad, tensor in zip(grads, (given[0], *given[2:]), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=4)))
def test_only_the_wanted_gradients(device: str, wanted: tuple[bool, ...]) -> None:
    given = inputs(device, 4)
    full = run(given, device)
    tensors = (given[0], *given[2:])
    leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
    output = sampling.ms_deform_attn_fused(leaves[0], given[1], *leaves[1:], impl=device)
    assert output.requires_grad == any(wanted)
    if any(wanted):
        output.backward(torch.linspace(-1, 1, output.numel(), device=device, dtype=output.dtype).view(output.shape))
    for leaf, want, expected in zip(leaves, wanted, full[1:], strict=True):
        assert (leaf.grad is not None) == want
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_inputs_is_kept(device: str, dtype: torch.dtype) -> None:
    """No sampled tensor, no locations, no softmax: the backward has what the caller has already."""
    value, shapes, *rest = inputs(device, dtype=dtype, grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sampling.ms_deform_attn_fused(value, shapes, *rest, impl=device)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (value, *rest)]
    assert [t.dtype for t in kept] == [dtype, torch.float32, dtype, dtype]


def test_second_derivative_is_refused(device: str) -> None:
    value, shapes, *rest = inputs(device, grad=True)
    output = sampling.ms_deform_attn_fused(value, shapes, *rest, impl=device)
    (grad,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    with pytest.raises(OpError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("channels", [16, 32])
def test_float32(device: str, coordinates: int, channels: int) -> None:
    """Within 1e-5 of double, relative to the sum of magnitudes that each number is made of."""
    given = inputs(device, coordinates, channels=channels, queries=50, dtype=torch.float32)
    exact = double(given)
    scale = run((exact[0].abs(), *exact[1:]), "torch")[0]
    actual, expected = run(given, device), run(exact, "torch")
    assert ((actual[0] - expected[0]).abs() <= 1e-5 * scale + 1e-6).all()
    for a, e in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=2e-5 * float(e.abs().max()))


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("offsets_dtype", ["same", "float32"])
def test_half_precision_is_storage_only(device: str, dtype: torch.dtype, eps: float, offsets_dtype: str) -> None:
    """The fp32 result on the rounded inputs, rounded once: softmax, coordinates and sums are fp32."""
    value, shapes, references, offsets, logits = inputs(device, channels=32, queries=200, dtype=dtype)
    if offsets_dtype == "float32":
        offsets, logits = offsets.float(), logits.float()
    half = run((value, shapes, references, offsets, logits), device, torch.ones(2, 200, 96, device=device, dtype=dtype))
    widened = (value.float(), shapes, references, offsets.float(), logits.float())
    single = run(widened, device, torch.ones(2, 200, 96, device=device))
    assert [t.dtype for t in half] == [dtype, dtype, torch.float32, offsets.dtype, logits.dtype]
    for h, s in zip(half, single, strict=True):
        assert (h.float() - s).abs().max() <= 1.01 * eps * s.abs().max()


def test_bfloat16_places_points_exactly(device: str) -> None:
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


def test_same_bits_whatever_the_threads() -> None:
    """12 threads are more than images times heads: the backward then makes two sweeps."""
    given = inputs("cpu", 4, channels=32, queries=300, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 12):
            torch.set_num_threads(threads)
            results.append(run(given, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_every_instruction_set(name: str, coordinates: int) -> None:
    """The kernels that this processor would not pick by itself compute the same."""
    given = inputs("cpu", coordinates, channels=47, points=13, dtype=torch.float32)
    exact = double(given)
    expected = run(exact, "torch")
    with instruction_set(name):
        actual = run(given, "cpu"), run(exact, "cpu")
    for results, rtol in zip(actual, (1e-4, 1e-12), strict=True):
        for a, e in zip(results, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=rtol, atol=rtol * max(1.0, float(e.abs().max())))


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_other_gradients_keep_their_bits_without_that_of_the_references(name: str, coordinates: int) -> None:
    """No encoder wants it: its points of reference are no function of a weight."""
    value, shapes, references, *rest = given = inputs("cpu", coordinates, channels=32, queries=300, dtype=torch.float32)
    leaves = [t.detach().requires_grad_() for t in (value, *rest)]
    with instruction_set(name):
        output = run(given, "cpu")[0]
        actual = sampling.ms_deform_attn_fused(leaves[0], shapes, references, *leaves[1:], impl="cpu")
        actual.backward(output)
        expected = run(given, "cpu", output)[1:]
    for leaf, gradient in zip(leaves, (expected[0], *expected[2:]), strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)


def test_composed_where_a_library_has_no_fused_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(device, 4)
    expected = run(given, device)
    monkeypatch.setattr(sampling, "fused", lambda implementation: False)
    for a, e in zip(run(given, device), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


# torch's own tracing looks at .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("dtype", "coordinates"), [(torch.float32, 2), (torch.bfloat16, 4)])
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(device: str, dtype: torch.dtype, coordinates: int, grad: bool) -> None:
    """Schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes."""
    value, shapes, *rest = inputs(device, coordinates, queries=3, heads=2, dtype=dtype, shapes=SHAPES[:2], grad=grad)
    build.load(device)
    if not sampling.has_fused_kernel(device):
        pytest.skip(f"no fused kernel for {device}")
    flat = [size for shape in shapes for size in shape]
    torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn_fused, (value, *rest, flat))
    if not grad:
        arguments = (torch.ones(2, 3, 16, device=device, dtype=dtype), value, *rest, flat)
        for wanted in ([True] * 4, [False, True, False, True]):
            torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn_fused_backward, (*arguments, wanted))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(device: str, backend: str) -> None:
    def call(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return sampling.ms_deform_attn_fused(value * 2, SHAPES, references.sigmoid(), offsets, logits).relu()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for queries in (5, 9):
        value, _, *rest = inputs(device, queries=queries, dtype=torch.float32, grad=True)
        results = []
        for function in (call, compiled):
            output = function(value, *rest)
            results.append([output, *torch.autograd.grad(output.sum(), (value, *rest))])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-5)


class Sampling(torch.nn.Module):
    def forward(self, value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return sampling.ms_deform_attn_fused(value, SHAPES, references, offsets, logits) + 1


def test_exports(device: str) -> None:
    value, _, *rest = inputs(device, dtype=torch.float32)
    sampling.choose("auto", device)
    queries = torch.export.Dim("queries", min=2, max=1000)
    dynamic = ({}, {1: queries}, {1: queries}, {1: queries})
    program = torch.export.export(Sampling(), (value, *rest), dynamic_shapes=dynamic)
    assert any("ms_deform_attn" in str(node.target) for node in program.graph.nodes)
    value, _, *rest = inputs(device, dtype=torch.float32, queries=11)
    torch.testing.assert_close(program.module()(value, *rest), Sampling()(value, *rest), rtol=1e-5, atol=1e-5)


GOOD = inputs("cpu", dtype=torch.float32)
NAMES = ("value", "spatial_shapes", "reference_points", "offsets", "logits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": GOOD[0][0]}, r"needs value \[N, S, M, D\]"),
        ({"value": GOOD[0][:1]}, "images and heads"),
        ({"value": GOOD[0][:, 1:]}, "sum to S = 35"),
        ({"spatial_shapes": SHAPES[:3]}, "levels of spatial_shapes"),
        ({"offsets": GOOD[3][..., :1]}, r"\(x, y\)"),
        ({"logits": GOOD[4][:, 1:]}, "must be logits"),
        ({"reference_points": GOOD[2][..., :1]}, r"must be \[2, 7, 4, 2\]"),
        ({"reference_points": GOOD[2][:, 1:]}, "queries and levels"),
        ({"reference_points": GOOD[2][:, :, 0]}, "queries and levels"),
        ({"reference_points": GOOD[2].bfloat16()}, "misplaces"),
        ({"reference_points": GOOD[2].double()}, "torch.float32"),
        ({"reference_points": GOOD[2].to("meta")}, "one device"),
        ({"value": GOOD[0].double()}, "torch.float64"),
        ({"offsets": GOOD[3].int()}, "must be fp64"),
        ({"offsets": GOOD[3].to("meta")}, "one device"),
        ({"impl": "cuda"}, "model.op=auto"),
        ({"impl": "gpu"}, "no implementation 'gpu'"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(OpError, match=message):
        sampling.ms_deform_attn_fused(**{**dict(zip(NAMES, GOOD, strict=True)), **change})  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    "change",
    [
        {"value": GOOD[0][:, 1:]},
        {"reference_points": GOOD[2][:, 1:]},
        {"reference_points": GOOD[2][..., :1]},
        {"reference_points": GOOD[2].double()},
        {"offsets": GOOD[3][:, 1:]},
        {"offsets": GOOD[3].double(), "logits": GOOD[4].double()},
        {"logits": GOOD[4].bfloat16()},
        {"logits": GOOD[4][..., :2]},
        {"spatial_shapes": SHAPES[:3]},
        {"spatial_shapes": [*SHAPES[:2], (2**31, 2**31), (1, 1)]},
    ],
)
def test_bad_input_does_not_pass_the_bare_operator(change: dict[str, object]) -> None:
    """Who calls torch.ops directly gets an error, not a read out of bounds."""
    build.load("cpu")
    value, shapes, *rest = {**dict(zip(NAMES, GOOD, strict=True)), **change}.values()
    flat = [size for shape in shapes for size in shape]  # type: ignore[attr-defined]  # a list of pairs
    with pytest.raises(RuntimeError, match="ms_deform_attn"):
        torch.ops.deformable_detr.ms_deform_attn_fused(value, *rest, flat)
