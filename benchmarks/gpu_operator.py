"""The operator's part of `benchmarks.gpu`: errors against double precision, times of captured CUDA graphs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.op import LARGE, Case, inputs
from pipeline.csrc.kernels import Kernels
from pipeline.model.ops import sampling

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # relative to the largest number
FORMS = ("generic", "fast", "fused", "ordered", "grid_sample")  # ordered: fused, with the deterministic backward
CANDIDATES = {  # kernels that may replace the shipped ones; all are tried with the fused form, alone and together
    "fused_specialised": Kernels.SPECIALISED,
    "fused_sectors": Kernels.SECTORS,
    "fused_large_tiles": Kernels.LARGE_TILES,
    "fused_neighbours": Kernels.NEIGHBOURS,
    "fused_all": Kernels.SPECIALISED | Kernels.SECTORS | Kernels.LARGE_TILES | Kernels.NEIGHBOURS,
}
DECODER = replace(LARGE, name="decoder 800x1333", queries=300)
SMALL = Case("check", [(17, 23), (9, 12), (5, 6), (3, 3)], 32, 2)


@dataclass(frozen=True)
class Measurement:
    """One row of the table."""

    case: Case
    local: bool
    dtype: torch.dtype
    form: str


def measurements(batches: Sequence[int] = (2, 4, 1)) -> Iterator[Measurement]:
    """All rows, the ones that matter most first: the time may not suffice for the last."""
    for batch in batches:
        for case in (LARGE, DECODER):
            for local in (True, False):
                for dtype in (torch.float32, torch.bfloat16):
                    for form in (*FORMS, *CANDIDATES):
                        if form == "grid_sample" and (not local or dtype == torch.bfloat16):
                            continue  # it computes in fp32 anyway
                        if form == "ordered" and (batch != 2 or case.queries):
                            continue  # its price is wanted, at the size that matters
                        if form in CANDIDATES and (batch != 2 or case.queries or not local):
                            continue  # they are for the encoder
                        yield Measurement(replace(case, batch=batch), local, dtype, form)


def fused_inputs(case: Case, local: bool, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Value, reference points, offsets, logits: the same places as `op.inputs` draws, up to rounding."""
    value, locations, weights = (t.detach() for t in inputs(case, local, device, torch.float32))
    size = torch.tensor([[w, h] for h, w in case.shapes], device=device)[:, None]
    references = locations.mean(dim=(2, 4))
    offsets = (locations - references[:, :, None, :, None]) * size
    leaves = (value.to(dtype), references, offsets.to(dtype), weights.log().to(dtype))
    return tuple(t.contiguous().requires_grad_(t is not references) for t in leaves)


def kernels_of(form: str) -> Kernels:
    """The CUDA kernels that a form asks for."""
    return Kernels.GENERIC if form == "generic" else CANDIDATES.get(form, Kernels.SHIPPED)


def is_fused(form: str) -> bool:
    """Whether the operator includes softmax and locations."""
    return form in ("fused", "ordered", *CANDIDATES)


def prepare(row: Measurement, device: str) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """The leaves that get gradients, and the forward as a function."""
    impl = "torch" if row.form == "grid_sample" else device
    if is_fused(row.form):
        value, references, offsets, logits = fused_inputs(row.case, row.local, device, row.dtype)

        def fused() -> Tensor:
            return sampling.ms_deform_attn_fused(value, row.case.shapes, references, offsets, logits, impl=impl)

        return [value, offsets, logits], fused
    plain = inputs(row.case, row.local, device, row.dtype)
    return list(plain), lambda: sampling.ms_deform_attn(plain[0], row.case.shapes, plain[1], plain[2], impl=impl)


def check(row: Measurement, device: str) -> dict[str, Any]:
    """Errors of output and gradients against double precision on the same rounded inputs; `ok` if within tolerance."""
    leaves, forward = prepare(row, device)
    output = forward()
    grad = torch.linspace(-1, 1, output.numel(), device=device).to(row.dtype).view_as(output)
    actual = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    if is_fused(row.form):
        value, references, offsets, logits = fused_inputs(row.case, row.local, device, row.dtype)
        doubles = [t.detach().double().requires_grad_() for t in (value, offsets, logits)]
        size = torch.tensor([[w, h] for h, w in row.case.shapes], device=device)[:, None]
        places = references.double()[:, :, None, :, None] + doubles[1] / size
        weights = doubles[2].flatten(-2).softmax(-1).view(doubles[2].shape)
    else:
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        places, weights = doubles[1], doubles[2]
    truth = sampling.reference(doubles[0], row.case.shapes, places, weights)
    expected = [truth.detach(), *torch.autograd.grad(truth, doubles, grad.double())]
    errors = []
    for a, e in zip(actual, expected, strict=True):
        wrong = (a.double() - e).abs() / e.abs().max()
        # A location's gradient jumps at pixel centres, which rounding may cross: the worst in 10,000 are not counted.
        errors.append(float(wrong.flatten().kthvalue(max(1, int(wrong.numel() * 0.9999))).values))
    return {**describe(row), "errors": errors, "ok": max(errors) <= TOLERANCE[row.dtype]}


def describe(row: Measurement) -> dict[str, Any]:
    """The row's names, for the file."""
    return {
        "case": row.case.name,
        "batch": row.case.batch,
        "channels": row.case.channels,
        "points": "local" if row.local else "uniform",
        "dtype": str(row.dtype).removeprefix("torch."),
        "form": row.form,
    }


def compulsory_bytes(row: Measurement) -> int:
    """What a forward must move at least: its inputs and its output, once."""
    pixels = sum(h * w for h, w in row.case.shapes)
    outputs = row.case.batch * (row.case.queries or pixels) * 8
    points = outputs * len(row.case.shapes) * 4
    size = row.dtype.itemsize
    place = 3 * size if is_fused(row.form) else 12
    return row.case.batch * pixels * 8 * row.case.channels * size + points * place + outputs * row.case.channels * size


def graph_seconds(function: Callable[[], Any], replays: int = 5) -> float:
    """Best time of a captured graph of `function`. Raises RuntimeError if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # warms up: allocations, lazy loading
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times[1:])


def measure(row: Measurement) -> dict[str, Any]:
    """Milliseconds of forward and backward."""
    torch.use_deterministic_algorithms(row.form == "ordered")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # the filling is no part of the kernel's time
    leaves, forward = prepare(row, "cuda")
    repeats = 2 if row.form == "grid_sample" else 10
    grad = torch.ones_like(forward())

    def backward() -> None:
        output = forward()
        for _ in range(repeats):
            torch.autograd.grad(output, leaves, grad, retain_graph=True)

    ahead = graph_seconds(lambda: [forward() for _ in range(repeats)]) / repeats
    back = max(0.0, graph_seconds(backward) - ahead) / repeats
    gigabytes = compulsory_bytes(row) / ahead / 1e9
    return {**describe(row), "forward_ms": 1e3 * ahead, "backward_ms": 1e3 * back, "forward_gb_s": gigabytes}
