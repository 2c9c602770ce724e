"""The CUDA kernels themselves, run on the CPU (tests/csrc/cuda_host) with address and undefined-behaviour sanitizers.

Blocks and lanes run in a random order, shared memory starts as NaN, and so do the outputs. Truth is grid_sample in
double precision. Known bugs of other implementations, and bugs inserted on purpose, must be detected.
"""

import hashlib
import itertools
import math
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.csrc import build
from pipeline.csrc.kernels import Kernels
from pipeline.csrc.recipe import SOURCES, find_compiler, run_compiler
from pipeline.model.ops import sampling

HERE = Path(__file__).parent / "cuda_host"
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


def _find_cxx() -> str | None:
    compiler = find_compiler("cpu")
    return compiler.path if compiler else None


pytestmark = pytest.mark.skipif(_find_cxx() is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def program() -> Path:
    """The compiled runner; stored beside the operator's libraries, under a name that depends on its sources."""
    compiler = _find_cxx()
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
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
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


BASE = Case()
ENCODER = Case(queries=0, shapes=((9, 11), (5, 6), (3, 3)), heads=2)
FAST = [
    *(replace(BASE, dtype=d, channels=c) for d in TYPES if d != torch.float64 for c in (16, 32, 64, 128)),
    replace(BASE, batch=1, queries=1, heads=1),
    replace(BASE, batch=3, queries=37, heads=3, seed=5),  # tiles hang over, images must not mix
    replace(BASE, dtype=torch.bfloat16, batch=3, queries=67, heads=1),
    replace(BASE, points=1, shapes=((5, 7),)),
    replace(BASE, points=3, shapes=((5, 7), (3, 4), (2, 2))),
    replace(ENCODER, dtype=torch.bfloat16),
    replace(ENCODER, channels=128, batch=1, heads=1, shapes=((5, 9), (3, 2))),
    replace(ENCODER, dtype=torch.float16, channels=16, heads=1),
    ENCODER,
]
GENERIC = [
    *(replace(BASE, dtype=d, channels=c) for d, c in zip(TYPES, (33, 5, 8, 40), strict=True)),
    *(replace(BASE, kernels=Kernels.GENERIC, dtype=d) for d in TYPES[2:]),
    replace(BASE, batch=1, queries=13, heads=1, channels=1),
    replace(BASE, misaligned=4),
    replace(BASE, dtype=torch.bfloat16, misaligned=2),
]


# every kind of fast kernel: float32 and bf16, rows of 4 to 32 lanes
WIDTHS = [replace(BASE, dtype=d, channels=c) for d in (torch.float32, torch.bfloat16) for c in (32, 64, 128)]
EVERY = Kernels.SPECIALISED | Kernels.SECTORS | Kernels.LARGE_TILES | Kernels.NEIGHBOURS
GENERIC_TOO = [replace(BASE, kernels=Kernels.GENERIC, dtype=d) for d in (torch.float32, torch.bfloat16)]


def slow_unless_usual(cases: Sequence[Case]) -> list[Any]:
    """Sizes and types that are as usual in a model are tried at once, the others by the long tests."""
    usual = [case.dtype != torch.float16 and case.channels in (32, 64) for case in cases]
    return [c if u else pytest.param(c, marks=pytest.mark.slow) for c, u in zip(cases, usual, strict=True)]


SPECIAL = [*WIDTHS, *slow_unless_usual([replace(case, kernels=EVERY) for case in WIDTHS]), *GENERIC_TOO]


def name_of(case: Case) -> str:
    defaults = Case()
    changed = {k: v for k, v in vars(case).items() if v != getattr(defaults, k)}
    return ",".join(f"{k}={v}".replace("torch.", "").replace(" ", "") for k, v in changed.items()) or "default"


@pytest.mark.parametrize("case", FAST, ids=name_of)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_fast_kernels_equal_reference(program: Path, tmp_path: Path, case: Case, fused: bool) -> None:
    check(program, tmp_path, case, fused, fast=True)


@pytest.mark.parametrize("case", GENERIC, ids=name_of)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_generic_kernels_equal_reference(program: Path, tmp_path: Path, case: Case, fused: bool) -> None:
    check(program, tmp_path, case, fused, fast=False)


@pytest.mark.parametrize("case", [BASE, replace(BASE, dtype=torch.bfloat16), replace(BASE, channels=7)], ids=name_of)
def test_fused_kernels_reference_boxes_equal_reference(program: Path, tmp_path: Path, case: Case) -> None:
    check(program, tmp_path, replace(case, reference=4), fused=True, fast=case.channels != 7)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_fused_backward_too_many_points_is_refused(program: Path, tmp_path: Path, fused: bool) -> None:
    """36 points: the plain kernels loop. The fused backward keeps at most 32, so it is composed of steps."""
    check(program, tmp_path, replace(BASE, points=9), fused, fast=True)


@pytest.mark.parametrize("case", [BASE, replace(BASE, kernels=Kernels.GENERIC), replace(ENCODER, batch=3)], ids=name_of)
def test_kernels_images_are_independent(program: Path, tmp_path: Path, case: Case) -> None:
    """Image i is filled with i + 1, so any other number is another image's (the straddling blocks of DCNv4)."""
    inputs = draw(case, fused=False)
    locations, weights = (torch.full_like(inputs.places[0], 0.5), inputs.places[1])
    weights = weights / weights.sum((-2, -1), keepdim=True)
    filled = torch.arange(1.0, case.batch + 1).view(-1, 1, 1, 1).expand_as(inputs.value)
    (output,), _ = run(program, tmp_path, case, Inputs(inputs.grad_output, filled, (locations, weights)), False)
    torch.testing.assert_close(output, filled[:, :1, 0, :1].expand_as(output))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    "case",
    [
        *SPECIAL,
        replace(BASE, dtype=torch.float16),
        ENCODER,
        *(replace(ENCODER, dtype=torch.bfloat16, kernels=k) for k in (Kernels.SHIPPED, EVERY)),
    ],
    ids=name_of,
)
def test_kernels_points_off_the_map_give_zero(program: Path, tmp_path: Path, case: Case, fused: bool) -> None:
    """Far, infinite and NaN points read nothing, even where the map is infinite, and have gradient zero.

    The slots that such points leave unwritten are the ones that DCNv4 reads: garbage in the softmax's gradient.
    """
    inputs = draw(case, fused)
    bad = torch.tensor(list(itertools.product([-3e4, 3e4, math.nan, math.inf, -math.inf], repeat=2)))
    index = 1 if fused else 0
    places = list(inputs.places)
    places[index] = (
        bad.repeat(places[index].numel() // 50 + 1, 1)
        .flatten()[: places[index].numel()]
        .to(places[index].dtype)
        .view(places[index].shape)
    )
    given = replace(inputs, value=torch.full_like(inputs.value, math.inf), places=tuple(places))
    for backward in (False, True):
        results, fast = run(program, tmp_path, case, given, backward)
        assert fast == (case.kernels != Kernels.GENERIC)
        for result in results:
            assert (result == 0).all()


@pytest.mark.parametrize("kind", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("case", SPECIAL, ids=name_of)
def test_fused_kernels_special_logits_equal_softmax(program: Path, tmp_path: Path, kind: float, case: Case) -> None:
    """As torch's softmax has it: minus infinity is weight 0; NaN and infinity make their own query NaN, no other."""
    inputs = draw(case, fused=True)
    logits = inputs.places[2].clone()
    logits[0, 2, 1, 0, 3] = kind
    middle = torch.full_like(inputs.places[0], 0.53)  # all on the map
    given = replace(inputs, places=(middle, torch.zeros_like(inputs.places[1]), logits))
    (output, fast), (gradients, fast_backward) = (run(program, tmp_path, case, given, b) for b in (False, True))
    assert fast == fast_backward == (case.kernels != Kernels.GENERIC)
    for a, e in zip([*output, *gradients], truth(case, given), strict=True):
        tolerance = max(1e-4, 2 * TOLERANCE[a.dtype])
        largest = float(e.nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * max(largest, 1), equal_nan=True)


@pytest.mark.parametrize("case", SPECIAL, ids=name_of)
def test_fused_kernels_special_boxes_equal_reference(program: Path, tmp_path: Path, case: Case) -> None:
    """NaN and infinite boxes sample nothing and give finite gradients."""
    case = replace(case, reference=4, queries=25)
    inputs = draw(case, fused=True)
    special = torch.tensor(list(itertools.product([0.5, 1e30, math.nan, math.inf, -math.inf], repeat=2)))
    references = inputs.places[0].clone()
    references[0, :, :, 2:] = special[:, None]
    references[1, :, :, :2] = special[:, None]
    given = replace(inputs, places=(references, *inputs.places[1:]))
    for backward in (False, True):
        results, fast = run(program, tmp_path, case, given, backward)
        assert fast == (case.kernels != Kernels.GENERIC)
        for result in results:
            assert result.isfinite().all()


PYRAMID = Case(batch=1, queries=0, shapes=((17, 18), (9, 9), (4, 5), (3, 2)), heads=1)  # no multiples of a tile
TWO_LEVELS = replace(PYRAMID, shapes=((17, 9), (5, 6)))
HALVES = (torch.bfloat16, torch.float16)
CANDIDATES = [
    *(replace(BASE, dtype=d, kernels=Kernels.SPECIALISED) for d in (torch.float32, *HALVES)),
    *(replace(PYRAMID, dtype=d, kernels=Kernels.SPECIALISED) for d in (torch.float32, torch.bfloat16)),
    *(replace(BASE, dtype=d, channels=c, kernels=Kernels.SECTORS) for d in HALVES for c in (16, 32, 64, 128)),
    replace(ENCODER, dtype=torch.bfloat16, kernels=Kernels.SECTORS),
    replace(PYRAMID, kernels=Kernels.LARGE_TILES),
    replace(TWO_LEVELS, channels=128, kernels=Kernels.LARGE_TILES),
    replace(TWO_LEVELS, batch=2, dtype=torch.bfloat16, kernels=Kernels.LARGE_TILES),
    replace(BASE, queries=37, kernels=Kernels.LARGE_TILES),  # the decoder has no tiles
    replace(TWO_LEVELS, channels=64, batch=2, kernels=Kernels.NEIGHBOURS),
    replace(BASE, batch=3, queries=67, heads=3, kernels=Kernels.NEIGHBOURS),
    replace(BASE, batch=1, queries=1, heads=1, kernels=Kernels.NEIGHBOURS),  # more processors than blocks
    *(replace(PYRAMID, dtype=d, kernels=EVERY) for d in (torch.float32, *HALVES)),
    replace(PYRAMID, batch=2, heads=2, dtype=torch.bfloat16, shapes=((5, 17), (3, 8), (2, 4), (1, 2)), kernels=EVERY),
    *(replace(ENCODER, dtype=torch.bfloat16, channels=c, kernels=EVERY) for c in (64, 128)),
]


@pytest.mark.parametrize("case", slow_unless_usual(CANDIDATES), ids=name_of)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_chosen_kernels_equal_reference(program: Path, tmp_path: Path, case: Case, fused: bool) -> None:
    check(program, tmp_path, case, fused, fast=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [Kernels.SHIPPED, Kernels.SPECIALISED, Kernels.SECTORS, Kernels.LARGE_TILES, EVERY])
def test_chosen_kernels_are_those_that_run(program: Path, tmp_path: Path, dtype: torch.dtype, kernels: Kernels) -> None:
    case = replace(BASE, dtype=dtype, kernels=kernels)
    inputs = draw(case, fused=True)
    forward, backward = (launch(program, tmp_path, case, inputs, b).kernels for b in (False, True))
    assert ("specialised_forward_kernel" in forward) == (Kernels.SPECIALISED in kernels)
    threads = 512 if Kernels.LARGE_TILES in kernels else 256
    assert (f"Li{threads}ELi4ELi4E" in forward) == (Kernels.SPECIALISED in kernels)
    assert "fast_backward_kernel" in backward
    assert ("Lb1E" in backward) == (Kernels.SECTORS in kernels and dtype == torch.bfloat16)


@pytest.mark.parametrize(
    "change", [{"channels": 64}, {"points": 2}, {"shapes": BASE.shapes[:3]}, {"reference": 4}], ids=str
)
def test_specialised_kernel_other_sizes_run_the_shipped_one(
    program: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    case = replace(BASE, kernels=Kernels.SPECIALISED, **change)
    check(program, tmp_path, case, fused=True, fast=True)
    assert "specialised" not in launch(program, tmp_path, case, draw(case, fused=True), False).kernels


def test_kernels_any_thread_order_differs_only_by_rounding(program: Path, tmp_path: Path) -> None:
    inputs = draw(ENCODER, fused=False)
    first, _ = run(program, tmp_path, ENCODER, inputs, backward=True)
    second, _ = run(program, tmp_path, replace(ENCODER, seed=99), inputs, backward=True)
    assert torch.equal(first[1], second[1])  # one writer each
    assert torch.equal(first[2], second[2])
    torch.testing.assert_close(first[0], second[0], rtol=1e-4, atol=1e-5)


ORDERED = [
    *(replace(BASE, ordered=True, dtype=d, channels=c) for d, c in zip(TYPES, (32, 5, 16, 33), strict=True)),
    replace(BASE, ordered=True, batch=1, queries=13, heads=1, channels=40, shapes=((67, 2), (3, 9))),
    replace(ENCODER, ordered=True, batch=1, heads=1, shapes=((5, 9), (3, 2))),
]


@pytest.mark.parametrize("case", ORDERED, ids=name_of)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_ordered_kernel_gives_same_bits(program: Path, tmp_path: Path, case: Case, fused: bool) -> None:
    """The result is right and has the same bits for any order of blocks and lanes."""
    check(program, tmp_path, case, fused, fast=None)
    inputs = draw(case, fused)
    first, second = (run(program, tmp_path, replace(case, seed=s), inputs, backward=True)[0] for s in (0, 99))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("divergent_barrier", "a barrier that not all threads reach"),
        ("divergent_shuffle", "lanes of a warp part"),
        ("forgotten_barrier", "NaN in the output"),
        ("uninitialised_slot", "NaN in the output"),
        ("beside_shared_memory", "heap-buffer-overflow"),
        ("misaligned_vector", "misaligned address"),
    ],
)
def test_harness_detects_known_bugs(program: Path, bug: str, message: str) -> None:
    """The replacement of CUDA is useful only if it detects bugs."""
    done = subprocess.run([program, "bug", bug], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert message in done.stderr
