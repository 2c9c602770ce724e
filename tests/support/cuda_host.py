"""The CUDA kernels on the CPU: the compiled runner of tests/csrc/cuda_host, its inputs, its results, their truth."""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.csrc import build
from pipeline.csrc.kernels import Kernels
from pipeline.csrc.recipe import SOURCES, find_compiler, run_compiler
from pipeline.model.ops import sampling

HERE = Path(__file__).parents[1] / "csrc" / "cuda_host"
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # the order of main.cpp
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-Wno-unknown-pragmas",
]
Shapes = Sequence[tuple[int, int]]


def find_cxx() -> str | None:
    compiler = find_compiler("cpu")
    return compiler.path if compiler else None


def build_program() -> Path:
    """The compiled runner; stored beside the operator's libraries, under a name that depends on its sources."""
    compiler = find_cxx()
    assert compiler
    sources = sorted([*HERE.rglob("*.*"), *SOURCES.glob("*.cuh"), SOURCES / "ms_deform_attn.h"])
    digest = hashlib.sha256(repr((compiler, FLAGS)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = build.cache_folder() / f"cuda_host-{digest.hexdigest()[:16]}"
    target = folder / "main"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    calls = {name: [f"{HERE}/{name}.cpp"] for name in ("main", "fibers")}
    for dtype in TYPES:
        name = str(dtype).removeprefix("torch.")
        calls[name] = [f"{HERE}/type.cpp", f"-DMSDA_TYPE={name}"]
    include = [f"-I{HERE}/include", f"-I{SOURCES}"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [[compiler, *FLAGS, *include, "-c", *call, "-o", f"{folder}/{name}.o"] for name, call in calls.items()]
        list(pool.map(run_compiler, jobs))
    scratch = folder / f"main-{os.getpid()}"
    run_compiler([compiler, *FLAGS, "-rdynamic", *(f"{folder}/{name}.o" for name in calls), "-ldl", "-o", str(scratch)])
    return scratch.replace(target)


@dataclass(frozen=True)
class Case:
    """Sizes and type of one run; `queries` 0: one per pixel."""

    dtype: torch.dtype = torch.float32
    channels: int = 32
    batch: int = 2
    queries: int = 7
    heads: int = 2
    points: int = 4
    shapes: Shapes = ((6, 4), (3, 2), (1, 5), (1, 1))
    reference: int = 2  # numbers in a reference of the fused form
    ordered: bool = False  # the backward whose sums have a fixed order
    kernels: Kernels = Kernels.SHIPPED
    misaligned: int = 0  # bytes
    seed: int = 0

    @property
    def real(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Inputs:
    """The tensors of a run: locations and weights, or references, offsets and logits."""

    grad_output: Tensor
    value: Tensor
    places: tuple[Tensor, ...]


def draw(case: Case, fused: bool) -> Inputs:
    """Random inputs, points up to two pixels off the map and 0.1 pixels from where the gradient jumps."""
    generator = torch.Generator().manual_seed(case.seed + case.channels)
    pixels = sum(h * w for h, w in case.shapes)
    queries = case.queries or pixels
    size = torch.tensor([[w, h] for h, w in case.shapes], dtype=torch.float64)[:, None]
    outer = (case.batch, queries, case.heads, len(case.shapes), case.points)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    value = torch.randn(case.batch, pixels, case.heads, case.channels, generator=generator).to(case.dtype)
    grad = torch.randn(case.batch, queries, case.heads * case.channels, generator=generator).to(case.dtype)
    wanted = (uniform(*outer, 2) * (size + 4) - 2).floor() + 0.1 + 0.8 * uniform(*outer, 2)  # pixels
    if not fused:
        weights = uniform(*outer)
        return Inputs(grad, value, (((wanted + 0.5) / size).to(case.real), weights.to(case.real)))
    # offsets are whole eighths, which every type holds; references are such that the points stay off the lattice
    logits = (2 * torch.randn(outer, generator=generator)).to(case.dtype)
    offsets = (wanted.floor() + (uniform(*outer, 2) * 6 + 1).floor() / 8).to(case.dtype)
    references = (0.5 / size).expand(case.batch, queries, -1, -1, -1)[..., 0, :] + 0.01 / size[:, 0]
    if case.reference == 4:  # an offset of P half sides is what one pixel is for points
        sides = (2 * case.points / size[:, 0]).expand_as(references)
        references = torch.cat([references, sides], -1)
    return Inputs(grad, value, (references.to(case.real).contiguous(), offsets, logits))


@dataclass(frozen=True)
class Ran:
    """What the kernels computed (output | gradients), whether the fast ones did, and the kernels' symbols."""

    results: list[Tensor]
    fast: bool
    kernels: str


def run(program: Path, folder: Path, case: Case, inputs: Inputs, backward: bool) -> tuple[list[Tensor], bool]:
    """Results, and whether the fast kernels ran."""
    ran = launch(program, folder, case, inputs, backward)
    return ran.results, ran.fast


def launch(program: Path, folder: Path, case: Case, inputs: Inputs, backward: bool) -> Ran:
    """Run a case."""
    fused = len(inputs.places) == 3
    queries, pixels = inputs.places[1].shape[1], inputs.value.shape[1]
    head = [
        2 * fused + backward,
        TYPES.index(case.dtype),
        case.ordered,
        case.kernels.value,
        case.seed,
        case.misaligned,
        case.reference,
    ]
    head += [case.batch, pixels, case.heads, case.channels, queries, len(case.shapes), case.points]
    head += [size for shape in case.shapes for size in shape]
    tensors = [torch.tensor(head), *([inputs.grad_output] if backward else []), inputs.value, *inputs.places]
    (folder / "in").write_bytes(b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors))
    call = [str(program), str(folder / "in"), str(folder / "out")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    if backward:  # sums are of the accumulation type; offsets and logits get their own
        value = torch.empty_like(inputs.value, dtype=case.real)
        expected = [value, *(torch.empty_like(t) for t in inputs.places)]
    else:
        expected = [torch.empty(case.batch, queries, case.heads * case.channels, dtype=case.dtype)]
    data, results = bytearray((folder / "out").read_bytes()), []
    for tensor in expected:
        size = tensor.numel() * tensor.element_size()
        results.append(torch.frombuffer(data[:size], dtype=tensor.dtype).view(tensor.shape) if size else tensor)
        data = data[size:]
    assert len(data) == 8
    return Ran(results, bool(data[0]), done.stdout)


def truth(case: Case, inputs: Inputs) -> list[Tensor]:
    """Output and gradients in double precision."""
    leaves = [t.double().requires_grad_() for t in (inputs.value, *inputs.places)]
    locations, weights = leaves[1], leaves[2]
    if len(leaves) == 4:
        references, offsets, logits = leaves[1:]
        size = torch.tensor([[w, h] for h, w in case.shapes], dtype=torch.float64)[:, None]
        weights = logits.flatten(-2).softmax(-1).view(logits.shape)
        middle = references[:, :, None, :, None, :2]
        if case.reference == 2:
            locations = middle + offsets / size
        else:
            locations = middle + offsets / case.points * references[:, :, None, :, None, 2:] * 0.5
    output = sampling.reference(leaves[0], case.shapes, locations, weights)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs.grad_output.double())]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def check(program: Path, folder: Path, case: Case, fused: bool, fast: bool | None) -> None:
    """Check that forward and backward agree with the truth, and that the expected kernels ran (None: any)."""
    inputs = draw(case, fused)
    expected = truth(case, inputs)
    actual, taken = run(program, folder, case, inputs, backward=False)
    gradients, taken_backward = run(program, folder, case, inputs, backward=True)
    assert fast is None or taken == fast
    if fast is not None and not (fused and fast and len(case.shapes) * case.points > 32):
        assert taken_backward == fast
    names = ["output", "value", *(["references", "offsets", "logits"] if fused else ["locations", "weights"])]
    for name, a, e in zip(names, [*actual, *gradients], expected, strict=True):
        tolerance = TOLERANCE[a.dtype]
        scale = float(e.abs().max())
        assert a.isfinite().all(), f"{name}: not all written"
        worst = float((a.double() - e).abs().max())
        assert worst <= tolerance * max(scale, 1e-3), f"{name}: off by {worst:g} of {scale:g}"


def name_of(case: Case) -> str:
    defaults = Case()
    changed = {k: v for k, v in vars(case).items() if v != getattr(defaults, k)}
    return ",".join(f"{k}={v}".replace("torch.", "").replace(" ", "") for k, v in changed.items()) or "default"
