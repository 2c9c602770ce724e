"""The operators on a GPU: devices, streams, graphs, sizes beyond 32 bits, the order of sums."""

import functools

import pytest
import torch
from support.operator import Inputs, inputs, run
from torch import Tensor

from pipeline.model.ops import sampling

pytestmark = pytest.mark.gpu
LARGE = 2**31
SAMPLED = 64  # queries whose results are compared where the whole would not fit twice


@pytest.fixture(autouse=True)
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@functools.cache
def expected() -> list[Tensor]:
    """By the reference, on the default stream of the first device."""
    return run(given("cuda"), "torch")


def given(device: str) -> Inputs:
    return inputs(device, channels=32, queries=50, dtype=torch.float32)


def same(actual: list[Tensor]) -> None:
    for a, e in zip(actual, expected(), strict=True):
        torch.testing.assert_close(a.cpu(), e.cpu(), rtol=1e-4, atol=1e-4)


def test_operator_second_device_works() -> None:
    """Tensors on cuda:1 while cuda:0 is the current device: its kernels, its stream, its results."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    results = run(given("cuda:1"), "cuda")
    assert {tensor.device for tensor in results} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    same(results)


def test_operator_other_stream_works() -> None:
    """The kernels run on the current stream, after the work that was queued there before."""
    stream = torch.cuda.Stream()
    value, shapes, locations, weights = given("cuda")
    late = torch.zeros_like(value)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(value.detach())
        results = run((late, shapes, locations, weights), "cuda")
    stream.synchronize()
    same(results)


def test_operator_captured_graph_repeats() -> None:
    """Nothing allocates outside the pool, waits for the host or reads it: a replay sees the new inputs."""
    value, shapes, locations, weights = (t.detach() if isinstance(t, Tensor) else t for t in given("cuda"))
    fixed = torch.zeros_like(value)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run((fixed, shapes, locations, weights), "cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run((fixed, shapes, locations, weights), "cuda")
    fixed.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    same(results)


@pytest.mark.parametrize("batch", [1, 3])
def test_operator_deterministic_gives_same_bits(batch: int) -> None:
    """Right results with the same bits every time; without the setting the order of sums depends on the threads."""
    case = inputs("cuda", batch=batch, queries=300, channels=32, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(case, "cuda"), run(case, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for ordered, free in zip(first, run(case, "cuda"), strict=True):
        torch.testing.assert_close(ordered, free, rtol=1e-4, atol=1e-4)


def test_operator_more_than_2_to_31_elements() -> None:
    """Offsets of 64 bits: the last images of a huge batch have the same result as alone (bf16, forward, backward)."""
    heads, channels = 8, 32
    shapes = [(100, 167), (50, 84), (25, 42), (13, 21)]
    pixels = sum(h * w for h, w in shapes)
    batch = LARGE // (pixels * heads * channels) + 2
    if torch.cuda.mem_get_info()[0] < 2.2 * LARGE * 6:  # value, its gradient in fp32 and in bf16
        pytest.skip("this GPU has less than 30 GB free")
    generator = torch.Generator("cuda").manual_seed(0)
    value = torch.randn(batch, pixels, heads, channels, device="cuda", dtype=torch.bfloat16, generator=generator)
    outer = (batch, SAMPLED, heads, len(shapes), 4)
    locations = torch.rand(*outer, 2, device="cuda", generator=generator)
    weights = torch.rand(outer, device="cuda", generator=generator)
    assert value.numel() > LARGE
    whole = value.requires_grad_()
    output = sampling.ms_deform_attn(whole, shapes, locations, weights, impl="cuda")
    (grad,) = torch.autograd.grad(output.float().sum(), whole)
    for image in (0, batch - 1):
        alone = (value.detach()[image : image + 1], shapes, locations[image : image + 1], weights[image : image + 1])
        ones = torch.ones(1, SAMPLED, heads * channels, device="cuda", dtype=torch.bfloat16)
        one, grad_one, *_ = run(alone, "cuda", ones)
        torch.testing.assert_close(output[image : image + 1], one, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(grad[image : image + 1], grad_one, rtol=1e-2, atol=1e-2)


def test_operator_does_not_synchronise() -> None:
    """No synchronisation in forward and backward: the levels reach the kernels as arguments."""
    case = given("cuda")
    run(case, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(case, "cuda", torch.ones(2, 50, 96, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(tensor.isfinite().all() for tensor in results)
