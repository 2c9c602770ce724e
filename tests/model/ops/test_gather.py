"""The exported form of the operator against grid_sample: the same values, also off the map and for NaN."""

import math

import pytest
import torch
from support.operator import SHAPES, inputs, run
from torch import Tensor

from pipeline.model.ops import sampling
from pipeline.model.ops.gather import gather_samples

FLAT = [(1, 7), (5, 1), (1, 1)]  # maps one pixel high, wide, or both


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1], FLAT], ids=["levels", "one level", "flat"])
@pytest.mark.parametrize(("channels", "points"), [(1, 1), (3, 4), (32, 4)])
def test_gather_values_and_gradients_equal_grid_sample(
    shapes: list[tuple[int, int]], channels: int, points: int
) -> None:
    given = inputs("cpu", queries=11, channels=channels, points=points, shapes=shapes)
    for name, actual, expected in zip("ovlw", run(given, "gather"), run(given, "torch"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
def test_gather_keeps_types(dtype: torch.dtype, tolerance: float) -> None:
    value, shapes, locations, weights = inputs("cpu", queries=50, dtype=dtype, grad=False)
    weights = weights / weights.sum((-1, -2), keepdim=True)  # as after the softmax
    actual = sampling.ms_deform_attn(value, shapes, locations, weights, impl="gather")
    expected = sampling.ms_deform_attn(value, shapes, locations, weights, impl="torch")
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def edge_points(height: int, width: int) -> Tensor:
    """All combinations of locations on, between and just beyond pixels, relative [Q, 2]; also NaN and infinity."""
    places = []
    for size in (width, height):
        pixels = torch.tensor([-1.0, -1 + 1e-6, -0.5, 0, 0.5, size - 1.5, size - 1, size - 0.5, size - 1e-6, size, 1e7])
        places.append(torch.cat([(pixels + 0.5) / size, torch.tensor([math.nan, math.inf, -math.inf, 3e38])]))
    return torch.cartesian_prod(places[0], places[1])


@pytest.mark.parametrize("size", [(3, 5), (1, 6), (6, 1), (1, 1)])
def test_gather_edges_and_nan_equal_reference(size: tuple[int, int]) -> None:
    points = edge_points(*size)
    value = torch.randn(1, size[0] * size[1], 2, 4)
    locations = points.view(1, -1, 1, 1, 1, 2).expand(-1, -1, 2, -1, -1, -1)
    weights = torch.ones(locations.shape[:-1])
    actual = gather_samples(value, [size], locations, weights)
    torch.testing.assert_close(actual, sampling.reference(value, [size], locations, weights), rtol=1e-6, atol=1e-6)
    assert not actual[0, ~points.isfinite().all(-1)].any()


def test_gather_nan_pixel_stays_local() -> None:
    """Points off the map read no pixel, so that zero times NaN cannot occur."""
    value = torch.full((1, 4, 1, 2), math.nan)
    locations = torch.tensor([[2.0, 0.5], [0.5, -3.0], [math.nan, 0.5], [0.25, 0.25]]).view(1, 4, 1, 1, 1, 2)
    found = gather_samples(value, [(2, 2)], locations, torch.ones(1, 4, 1, 1, 1))
    assert found[0, :3].tolist() == [[0.0, 0.0]] * 3
    assert found[0, 3].isnan().all()


def test_gather_fused_equals_plain() -> None:
    value, shapes, _, logits = inputs("cpu", queries=5, grad=False)
    for sides in (2, 4):
        references = torch.rand(2, 5, len(shapes), sides, dtype=torch.float64)
        offsets = torch.randn(*logits.shape, 2, dtype=torch.float64)
        actual = sampling.ms_deform_attn_fused(value, shapes, references, offsets, logits, impl="gather")
        expected = sampling.ms_deform_attn_fused(value, shapes, references, offsets, logits, impl="torch")
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"points": 0}])
def test_gather_empty_tensors(empty: dict[str, int]) -> None:
    value, shapes, locations, weights = inputs("cpu", grad=False, **empty)
    actual = sampling.ms_deform_attn(value, shapes, locations, weights, impl="gather")
    torch.testing.assert_close(actual, sampling.ms_deform_attn(value, shapes, locations, weights, impl="torch"))
