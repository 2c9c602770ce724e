"""The sizes of the fast CUDA kernels: values, maps and points as the model has them, and that these kernels ran.

The same cases run on the CPU's kernels, so that each of them is tried on every machine.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.operator import FusedInputs, Inputs, double, fused_inputs, inputs, run
from torch import Tensor

from pipeline.csrc import build
from pipeline.csrc.kernels import Kernels, choose_kernels

SHAPES = [(9, 18), (5, 6), (3, 3), (2, 1)]
PIXELS = sum(height * width for height, width in SHAPES)
TYPES = [torch.float32, torch.bfloat16]
CASES = list(itertools.product(TYPES, (32, 64, 128), (7, PIXELS)))  # with all pixels the queries form rectangles
cases = pytest.mark.parametrize(("dtype", "channels", "queries"), CASES)
forms = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


ON_GPU = pytest.mark.gpu


@pytest.fixture(params=["cpu", *(pytest.param(f"cuda {each}", marks=ON_GPU) for each in ("shipped", "others"))])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation under test. On a GPU also with all kernels that may replace the shipped ones."""
    name, _, kernels = str(request.param).partition(" ")
    if name == "cpu":
        yield name
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    library = build.load(name)
    before = choose_kernels(library)
    choose_kernels(library, ~Kernels.GENERIC if kernels == "others" else Kernels.SHIPPED)
    yield name
    choose_kernels(library, before)


def draw(device: str, fused: bool, dtype: torch.dtype, channels: int, queries: int) -> Any:
    """Inputs whose truth in double precision is that of the rounded numbers."""
    make: Callable[..., Inputs | FusedInputs] = fused_inputs if fused else inputs
    return make(device, dtype=dtype, channels=channels, queries=queries, shapes=SHAPES)


def run_fast(given: Any, device: str) -> list[Tensor]:
    """Output and gradients; on a GPU checks that they come from the fast kernels, and from no other of ours."""
    if device == "cpu":
        return run(given, device)
    run(given, device)  # builds and loads the library
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        results = run(given, device)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any("fast_forward_kernel" in name or "specialised_forward_kernel" in name for name in names), names
    assert any("fast_backward_kernel" in name for name in names), names
    assert not any("msda::forward_kernel" in name or "msda::backward_kernel" in name for name in names), names
    return results


@forms
@cases
def test_fast_sizes_equal_double_precision(
    device: str, fused: bool, dtype: torch.dtype, channels: int, queries: int
) -> None:
    given = draw(device, fused, dtype, channels, queries)
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-4
    for a, e in zip(run_fast(given, device), run(double(given), "torch"), strict=True):
        scale = max(float(e.abs().max()), 1e-3)
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * scale)


@forms
@cases
def test_fast_sizes_points_off_the_map_give_zero(
    device: str, fused: bool, dtype: torch.dtype, channels: int, queries: int
) -> None:
    """Far, infinite and NaN points read nothing, even where the map is infinite, and have gradient zero."""
    value, shapes, *rest = draw(device, fused, dtype, channels, queries)
    places = rest[1] if fused else rest[0]
    bad = list(itertools.product([-3e4, 3e4, math.nan, math.inf, -math.inf], repeat=2))
    repeated = torch.tensor(bad).repeat(places.numel() // 50 + 1, 1).flatten()[: places.numel()]
    rest[1 if fused else 0] = repeated.view(places.shape).to(places)
    for result in run_fast((torch.full_like(value, math.inf), shapes, *rest), device):
        assert (result == 0).all()


@pytest.mark.parametrize("kind", [-math.inf, math.nan, math.inf])
@cases
def test_fast_sizes_special_logits_equal_softmax(
    device: str, kind: float, dtype: torch.dtype, channels: int, queries: int
) -> None:
    """Minus infinity is weight 0; NaN and infinity make their own query NaN, no other."""
    value, shapes, references, offsets, logits = draw(device, True, dtype, channels, queries)
    logits = logits.detach().clone()
    logits[0, 2, 1, 0, 3] = kind
    given = (value, shapes, torch.full_like(references, 0.53), torch.zeros_like(offsets), logits)
    output, *_ = run_fast(given, device)
    expected, *_ = run(double(given), "torch")
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert output[1].isfinite().all()
