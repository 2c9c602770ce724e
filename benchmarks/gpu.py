"""`python -m benchmarks.gpu`: builds the CUDA operator, checks every variant, times it, and keeps the numbers.

One GPU, at most 8 minutes, and nothing but torch, numpy and this project (the training step also needs what the model
imports; without that it is left out and the file says so). Writes benchmarks/results/DATE_GPU.json. Exits 2 without a
GPU and 1 if a variant is wrong. Times of the operator are of captured CUDA graphs: kernels only, no Python.
"""

import argparse
import ctypes
import datetime
import json
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.op import LARGE, Case, inputs
from jobs.cli import CommandParser, Parser, main
from pipeline.csrc import build
from pipeline.errors import OpError
from pipeline.model import ops

RESULTS = Path(__file__).parent / "results"
BUDGET = 450.0  # seconds; what does not fit is left out, and said
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # relative to the largest number
FORMS = ("generic", "fast", "fused", "ordered", "grid_sample")  # ordered: fused, with the deterministic backward
DECODER = replace(LARGE, name="decoder 800x1333", queries=300)
SMALL = Case("check", [(17, 23), (9, 12), (5, 6), (3, 3)], 32, 2)


@dataclass(frozen=True)
class Measurement:
    """One row of the table."""

    case: Case
    local: bool
    dtype: torch.dtype
    form: str


def measurements() -> Iterator[Measurement]:
    """All rows, the ones that matter most first: the time may not suffice for the last."""
    for batch in (2, 4, 1):
        for case in (LARGE, DECODER):
            for local in (True, False):
                for dtype in (torch.float32, torch.bfloat16):
                    for form in FORMS:
                        if form == "grid_sample" and (not local or dtype == torch.bfloat16):
                            continue  # it computes in fp32 anyway
                        if form == "ordered" and (batch != 2 or case.queries):
                            continue  # its price is wanted, at the size that matters
                        yield Measurement(replace(case, batch=batch), local, dtype, form)


def kernels(wanted: str | None = None) -> str:
    """Which CUDA kernels may run, `automatic` or `generic`, after setting that if `wanted`."""
    entry = ctypes.CDLL(str(build.load("cuda"))).msda_cuda_kernels
    entry.argtypes, entry.restype = [ctypes.c_char_p], ctypes.c_char_p
    name: bytes = entry(wanted.encode() if wanted else None)
    return name.decode()


def fused_inputs(case: Case, local: bool, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Value, reference points, offsets, logits: the same places as `op.inputs` draws, up to rounding."""
    value, locations, weights = (t.detach() for t in inputs(case, local, device, torch.float32))
    size = torch.tensor([[w, h] for h, w in case.shapes], device=device)[:, None]
    references = locations.mean(dim=(2, 4))
    offsets = (locations - references[:, :, None, :, None]) * size
    leaves = (value.to(dtype), references, offsets.to(dtype), weights.log().to(dtype))
    return tuple(t.contiguous().requires_grad_(t is not references) for t in leaves)


def prepare(row: Measurement, device: str) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """The leaves that get gradients, and the forward as a function."""
    impl = "torch" if row.form == "grid_sample" else device
    if row.form in ("fused", "ordered"):
        value, references, offsets, logits = fused_inputs(row.case, row.local, device, row.dtype)

        def fused() -> Tensor:
            return ops.ms_deform_attn_fused(value, row.case.shapes, references, offsets, logits, impl=impl)

        return [value, offsets, logits], fused
    plain = inputs(row.case, row.local, device, row.dtype)
    return list(plain), lambda: ops.ms_deform_attn(plain[0], row.case.shapes, plain[1], plain[2], impl=impl)


def check(row: Measurement, device: str) -> dict[str, Any]:
    """Errors of output and gradients against double precision on the same rounded inputs; `ok` if within tolerance."""
    leaves, forward = prepare(row, device)
    output = forward()
    grad = torch.linspace(-1, 1, output.numel(), device=device).to(row.dtype).view_as(output)
    actual = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    if row.form in ("fused", "ordered"):
        value, references, offsets, logits = fused_inputs(row.case, row.local, device, row.dtype)
        doubles = [t.detach().double().requires_grad_() for t in (value, offsets, logits)]
        size = torch.tensor([[w, h] for h, w in row.case.shapes], device=device)[:, None]
        places = references.double()[:, :, None, :, None] + doubles[1] / size
        weights = doubles[2].flatten(-2).softmax(-1).view(doubles[2].shape)
    else:
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        places, weights = doubles[1], doubles[2]
    truth = ops.reference(doubles[0], row.case.shapes, places, weights)
    expected = [truth.detach(), *torch.autograd.grad(truth, doubles, grad.double())]
    errors = []
    for a, e in zip(actual, expected, strict=True):
        wrong = (a.double() - e).abs() / e.abs().max()
        # the gradient of a place jumps at pixel centres, which rounding may cross: the worst in 10,000 do not count
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
    place = 3 * size if row.form in ("fused", "ordered") else 12
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


def training_step(
    impl: str, bf16: bool, device: str, size: tuple[int, int], steps: int, **model: Any
) -> dict[str, Any]:
    """A whole step of Deformable DETR, N = 2: forward, matching, losses, backward, clip, AdamW."""
    from pipeline.config import LossConfig, ModelConfig, OptimConfig
    from pipeline.model import build_criterion, build_model
    from pipeline.optim import build_optimizer

    torch.manual_seed(0)
    detector = build_model(ModelConfig(op=impl, **model), load_backbone=False).to(device).train()
    criterion = build_criterion(LossConfig()).to(device)
    optimizer = build_optimizer(detector, OptimConfig(), torch.device(device))
    images = torch.randn(2, 3, *size, device=device)
    mask = torch.zeros(2, *size, dtype=torch.bool, device=device)
    centres, sides = torch.rand(2, 8, 2) * 0.6 + 0.2, torch.rand(2, 8, 2) * 0.3 + 0.05
    boxes = torch.cat([centres, sides], -1).to(device)
    targets = [{"labels": torch.arange(8, device=device), "boxes": box} for box in boxes]
    num_boxes = torch.tensor(16.0, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            outputs = detector(images, mask)
        criterion.total(criterion(outputs, targets, num_boxes)).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
        optimizer.step()

    cuda = device == "cuda"
    for _ in range(2):
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    result = {"op": impl, "bf16": bf16, "size": list(size), "ms": 1e3 * seconds, "images_s": 2 / seconds}
    if cuda:
        result["mib_per_image"] = torch.cuda.max_memory_allocated() / 2**20 / 2
        result["host_synchronisations"] = synchronisations(step)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        slowest = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:15]
        result["kernels_ms"] = {event.key[:80]: event.self_device_time_total / 1e3 for event in slowest}
    return result


def synchronisations(function: Callable[[], None]) -> int:
    """How often `function` makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def versions() -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS)
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "memory_gib": properties.total_memory / 2**30}
        facts |= {"sms": properties.multi_processor_count, "library": build.facts(build.build("cuda"))}
    return facts


def write(results: dict[str, Any], folder: Path) -> Path:
    """Keep the results as DATE_GPU.json."""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(results["versions"].get("gpu", "none")).lower()).strip("-")
    path = folder / f"{results['versions']['date'][:10]}_{gpu}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.gpu", __doc__.splitlines()[0], "python -m benchmarks.gpu --budget 300")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything; default %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default %(default)s")
    return parser


def run(args: argparse.Namespace) -> int:
    """Build, check, time, write."""
    if not torch.cuda.is_available():
        raise OpError("there is no CUDA device here; run this on a machine with a GPU (benchmarks.op times the CPU)")
    start = time.monotonic()
    results: dict[str, Any] = {"versions": versions(), "checks": [], "steps": [], "times": [], "left_out": []}

    def attempt(part: str, name: object, function: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() - start > args.budget:
            results["left_out"].append(f"{name}: no time left")
            return
        try:
            results[part].append(function())
            print(results[part][-1], flush=True)
        except (RuntimeError, ImportError, OpError) as error:
            results["left_out"].append(f"{name}: {type(error).__name__}: {error}")
            print(results["left_out"][-1], flush=True)

    for form in FORMS[:3]:
        kernels("generic" if form == "generic" else "automatic")
        for dtype in TOLERANCE:
            for channels in (16, 32, 64, 128, 40):
                for queries in (None, 37):
                    row = Measurement(replace(SMALL, channels=channels, queries=queries), True, dtype, form)
                    attempt("checks", describe(row), partial(check, row, "cuda"))
    kernels("automatic")
    for impl, bf16 in (("torch", False), ("cuda", False), ("cuda", True)):
        name = f"training step, {impl}, {'bf16' if bf16 else 'fp32'}"
        attempt("steps", name, partial(training_step, impl, bf16, "cuda", (800, 1333), 5))
        torch.cuda.empty_cache()
    for row in measurements():
        kernels("generic" if row.form == "generic" else "automatic")
        attempt("times", describe(row), partial(measure, row))
    torch.use_deterministic_algorithms(False)
    results["seconds"] = time.monotonic() - start
    print(write(results, args.out))
    wrong = [check for check in results["checks"] if not check["ok"]]
    failed = [entry for entry in results["left_out"] if "no time left" not in entry]
    print(f"{len(results['checks'])} checks, {len(wrong)} wrong, {len(failed)} failed, {results['seconds']:.0f} s")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
