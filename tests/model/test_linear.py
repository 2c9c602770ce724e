"""Linear: nn.Linear's weights, results and gradients, whichever library multiplies."""

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline.model.linear import LEAST, Linear

IN, OUT = 64, 24
SHAPES = [(LEAST // IN + 1, IN), (2, 200, IN), (3, 5, 40, IN), (1, 2000, IN)]
FEW = [(0, IN), (1, IN), (2, 10, IN), (LEAST // IN, IN)]


def pair() -> tuple[Linear, nn.Linear]:
    torch.manual_seed(0)
    ours, theirs = Linear(IN, OUT), nn.Linear(IN, OUT, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def kernels(module: nn.Module, x: Tensor) -> set[str]:
    """Names of the operators that a forward runs."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        module(x)
    return {event.key for event in record.key_averages()}


@pytest.mark.parametrize("shape", SHAPES + FEW)
def test_results_and_gradients_are_those_of_nn_linear(shape: tuple[int, ...]) -> None:
    ours, theirs = pair()
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().double().requires_grad_()
    torch.testing.assert_close(ours(x).double(), theirs(y), rtol=1e-5, atol=1e-5)
    weights = torch.randn(*shape[:-1], OUT)
    (ours(x) * weights).sum().backward()
    (theirs(y) * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5)
    for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows_go_to_onednn_and_few_do_not(threads: int) -> None:
    ours, _ = pair()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        many, few = kernels(ours, torch.randn(1, 2000, IN)), kernels(ours, torch.randn(1, 20, IN))
    finally:
        torch.set_num_threads(before)
    assert "aten::mkldnn_convolution" in many
    assert not any("slow_conv" in name for name in many)
    assert "aten::addmm" in few
    assert "aten::mkldnn_convolution" not in few


def test_nothing_is_copied_on_the_way() -> None:
    ours, _ = pair()
    assert not {"aten::clone", "aten::copy_"} & kernels(ours, torch.randn(1, 2000, IN))
    assert ours(torch.randn(2, 2000, IN)).is_contiguous()


def test_a_strided_input_is_taken() -> None:
    ours, theirs = pair()
    x = torch.randn(IN, 2000).T
    torch.testing.assert_close(ours(x).double(), theirs(x.double()), rtol=1e-5, atol=1e-5)


def test_other_types_and_autocast_are_left_to_torch() -> None:
    ours, _ = pair()
    x = torch.randn(1, 2000, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    ours.double()
    assert "aten::mkldnn_convolution" not in kernels(ours, x.double())


def test_an_exporter_sees_a_linear_layer_for_any_number_of_rows() -> None:
    ours, _ = pair()
    sizes = {"x": {1: torch.export.Dim("rows", min=2, max=10**6)}}
    program = torch.export.export(ours, (torch.randn(1, 2000, IN),), dynamic_shapes=sizes)
    names = {str(node.target) for node in program.graph.nodes}
    assert "aten.linear.default" in names
    assert not any("conv" in name for name in names)
