"""The CUDA kernels themselves, run on the CPU (tests/csrc/cuda_host) with address and undefined-behaviour sanitizers.

Blocks and lanes run in a random order, shared memory starts as NaN, and so do the outputs. Truth is grid_sample in
double precision. Known bugs of other implementations, and bugs inserted on purpose, must be detected.
"""

import itertools
import math
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cuda_host import (
    TOLERANCE,
    TYPES,
    Case,
    Inputs,
    build_program,
    check,
    draw,
    find_cxx,
    launch,
    name_of,
    run,
    truth,
)

from pipeline.csrc.kernels import Kernels

pytestmark = pytest.mark.skipif(find_cxx() is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def program() -> Path:
    return build_program()


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
def test_kernels_with_more_points_than_fused_backward_keeps_equal_reference(
    program: Path, tmp_path: Path, fused: bool
) -> None:
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
    done = subprocess.run([program, "bug", bug], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert message in done.stderr
