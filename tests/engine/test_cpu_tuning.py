"""Tuning for CPUs: nn.Linear's weights, results and gradients, whichever library multiplies; off on a GPU."""

import copy
from typing import Any

import pytest
import torch
from support.model import small_config, small_detr
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline.config import TrainConfig
from pipeline.csrc.kernels import VARIABLE
from pipeline.engine import cpu_tuning
from pipeline.engine.cpu_tuning import (
    ALLOCATOR,
    KEEP_FREED_MEMORY,
    MIN_INPUT_NUMBERS,
    ConvolutionLinear,
    process_environment,
    tune_model,
)
from pipeline.model import build_model

IN, OUT = 64, 24
SHAPES = [(MIN_INPUT_NUMBERS // IN + 1, IN), (2, 200, IN), (3, 5, 40, IN), (1, 2000, IN)]
FEW = [(0, IN), (1, IN), (2, 10, IN), (MIN_INPUT_NUMBERS // IN, IN)]


def pair() -> tuple[ConvolutionLinear, nn.Linear]:
    torch.manual_seed(0)
    ours, theirs = ConvolutionLinear(IN, OUT), nn.Linear(IN, OUT, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def kernels(module: nn.Module, x: Tensor) -> set[str]:
    """Names of the operators that a forward runs."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        module(x)
    return {event.key for event in record.key_averages()}


@pytest.mark.parametrize("shape", SHAPES + FEW)
def test_convolution_linear_gives_results_and_gradients_of_nn_linear(shape: tuple[int, ...]) -> None:
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
def test_convolution_linear_uses_onednn_for_many_rows_only(threads: int) -> None:
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


def test_convolution_linear_copies_nothing() -> None:
    ours, _ = pair()
    assert not {"aten::clone", "aten::copy_"} & kernels(ours, torch.randn(1, 2000, IN))
    assert ours(torch.randn(2, 2000, IN)).is_contiguous()


def test_convolution_linear_takes_a_strided_input() -> None:
    ours, theirs = pair()
    x = torch.randn(IN, 2000).T
    torch.testing.assert_close(ours(x).double(), theirs(x.double()), rtol=1e-5, atol=1e-5)


def test_convolution_linear_leaves_other_types_and_autocast_to_torch() -> None:
    ours, _ = pair()
    x = torch.randn(1, 2000, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    ours.double()
    assert "aten::mkldnn_convolution" not in kernels(ours, x.double())


def test_convolution_linear_is_exported_as_a_linear_layer() -> None:
    ours, _ = pair()
    sizes = {"x": {1: torch.export.Dim("rows", min=2, max=10**6)}}
    program = torch.export.export(ours, (torch.randn(1, 2000, IN),), dynamic_shapes=sizes)
    names = {str(node.target) for node in program.graph.nodes}
    assert "aten.linear.default" in names
    assert not any("conv" in name for name in names)


CPU, ON, OFF = torch.device("cpu"), TrainConfig(), TrainConfig(cpu_tuning=False)
CONFIGS = {
    "deformable": small_config(hidden_dim=64, refine=True, queries=340),
    "two-stage": small_config(hidden_dim=64, refine=True, two_stage=True, queries=340),
    "detr": small_detr(hidden_dim=64, queries=340),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tune_model_keeps_weights_names_and_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = build_model(CONFIGS[name]).eval()
    tuned = copy.deepcopy(plain)
    parameters = dict(tuned.named_parameters())
    tune_model(tuned, ON, CPU)
    assert list(tuned.state_dict()) == list(plain.state_dict())
    assert all(parameters[key] is parameter for key, parameter in tuned.named_parameters())
    calls: list[int] = []
    convolution = cpu_tuning._as_convolution
    monkeypatch.setattr(
        cpu_tuning, "_as_convolution", lambda x, *args: calls.append(x.numel()) or convolution(x, *args)
    )
    images, mask = torch.randn(2, 3, 256, 256), torch.zeros(2, 256, 256, dtype=torch.bool)
    with torch.no_grad():
        expected = plain(images, mask)
        assert not calls
        found = tuned(images, mask)
    assert calls
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_tune_model_leaves_out_what_earlier_versions_did(name: str) -> None:
    """Bits of runs of earlier versions: what was tuned then is tuned now, and nothing else."""
    model = build_model(CONFIGS[name])
    tune_model(model, ON, CPU)
    plain = {key for key, layer in model.named_modules() if type(layer) is nn.Linear}
    expected: dict[str, set[str]] = {
        "deformable": {"transformer.reference_points"}, "two-stage": {"transformer.pos_trans"}, "detr": set()
    }  # fmt: skip
    assert plain == expected[name]
    assert sum(isinstance(layer, ConvolutionLinear) for layer in model.modules()) > 10


def test_tuning_on_a_gpu_or_switched_off_does_nothing() -> None:
    model = build_model(CONFIGS["deformable"])
    tune_model(model, OFF, CPU)
    tune_model(model, ON, torch.device("cuda"))
    assert not any(isinstance(layer, ConvolutionLinear) for layer in model.modules())
    assert process_environment(ON, use_gpu=False) == KEEP_FREED_MEMORY
    assert process_environment(ON, use_gpu=True) == {}
    assert process_environment(OFF, use_gpu=False) == {}


def test_expandable_segments_is_for_the_allocator_of_a_gpu() -> None:
    train = TrainConfig(expandable_segments=True)
    assert process_environment(train, use_gpu=True) == {ALLOCATOR: "expandable_segments:True"}
    assert process_environment(train, use_gpu=False) == KEEP_FREED_MEMORY


def test_chosen_kernels_reach_the_training_processes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sectors")
    train = TrainConfig(expandable_segments=True)
    assert process_environment(train, use_gpu=True) == {ALLOCATOR: "expandable_segments:True", VARIABLE: "sectors"}
    assert process_environment(train, use_gpu=False) == KEEP_FREED_MEMORY


def test_copy_of_a_tuned_model_is_tuned() -> None:
    """The moving average of the weights is such a copy."""
    model = build_model(CONFIGS["deformable"])
    tune_model(model, ON, CPU)
    kinds: Any = [type(layer) for layer in copy.deepcopy(model).modules()]
    assert kinds == [type(layer) for layer in model.modules()]
