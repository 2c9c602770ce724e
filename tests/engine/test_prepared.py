"""Weights that are folded and cast before each pass: the same numbers, and nothing is left behind in the model."""

from typing import Any

import pytest
import torch
from support.model import VARIANTS, small_config, small_detr
from support.worlds import OPTIM, STEPS, Trace, batch, run
from torch import nn

from pipeline.config import BackboneConfig, LossConfig, ModelConfig, Precision
from pipeline.engine.backend import PlainBackend
from pipeline.engine.cpu_tuning import use_channels_last
from pipeline.engine.module import LossModule, StepNorm
from pipeline.engine.prepared import PreparedWeights
from pipeline.model import build_criterion, build_model
from pipeline.model.backbones.norms import FrozenBatchNorm2d
from pipeline.model.compiled import compile_regions
from pipeline.runtime import single

FROZEN = {"name": "conv5", "weights": "none", "norm": "frozen_batch", "width": 8}
NORM = StepNorm(torch.tensor(8.0), torch.tensor(1.0))
SOFTMAX = LossConfig(classification="softmax", class_weight=1, class_cost=1)


def build(model: ModelConfig, loss: LossConfig, precision: Precision, cast: bool, fold: bool) -> LossModule:
    torch.manual_seed(0)
    module = LossModule(build_model(model), build_criterion(loss), precision, cast, fold)
    for norm in module.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            for buffer in norm.buffers():
                buffer.uniform_(0.5, 1.5)
    return module


def train(model: ModelConfig, precision: Precision, cast: bool, fold: bool, loss: LossConfig | None = None) -> Trace:
    module = build(model, loss or LossConfig(), precision, cast, fold)
    return run(module, PlainBackend(module, OPTIM, torch.device("cpu"), precision), single())


@pytest.mark.parametrize("variant", [*VARIANTS, "checkpoint_encoder", "own_level"])
def test_cast_weights_once_trains_the_same_bits(variant: str) -> None:
    extra: dict[str, Any] = {"checkpoint_encoder": {"checkpoint_encoder": True}, "own_level": {"cross_level": False}}
    config = small_config(dropout=0.1, backbone=FROZEN, **{**VARIANTS, **extra}[variant])
    each, once = (train(config, "bf16", cast, fold=False) for cast in (False, True))
    assert len(each.losses) == STEPS
    assert once.losses == each.losses
    assert all(torch.equal(once.weights[name], weight) for name, weight in each.weights.items())


def test_cast_weights_once_trains_detr_and_fp16_the_same_bits() -> None:
    each, once = (train(small_detr(dropout=0.1), "fp16", cast, False, SOFTMAX) for cast in (False, True))
    assert once.losses == each.losses
    assert once.applied == each.applied


def test_cast_weights_once_means_nothing_in_fp32() -> None:
    assert build(small_config(), LossConfig(), "fp32", cast=True, fold=False)._weights is None


@pytest.mark.parametrize("norm_valid", [False, True])
def test_fold_norms_trains_the_same_losses(norm_valid: bool) -> None:
    config = small_config(backbone=FROZEN, norm_valid=norm_valid)
    plain, folded = (train(config, "fp32", False, fold) for fold in (False, True))
    for a, b in zip(plain.losses, folded.losses, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-6)
    assert folded.norms == pytest.approx(plain.norms, rel=1e-4)


def test_fold_norms_in_low_precision_is_as_near_to_fp32_as_without() -> None:
    config = small_config(backbone=FROZEN)
    exact = train(config, "fp32", False, False).losses[0]["loss"]
    plain, folded = (abs(train(config, "bf16", True, fold).losses[0]["loss"] - exact) for fold in (False, True))
    assert folded < max(2 * plain, 1e-2 * exact)


@pytest.mark.parametrize("changes", [{"backbone": FROZEN}, {"norm_valid": True}], ids=["frozen_batch", "norm_valid"])
def test_channels_last_trains_the_same_losses(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    plain, other = (build(config, LossConfig(), "fp32", False, True) for _ in range(2))
    use_channels_last(other.model)
    traces = [run(m, PlainBackend(m, OPTIM, torch.device("cpu")), single()) for m in (plain, other)]
    weight = other.model.get_parameter("backbone.stages.1.0.0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    for a, b in zip(traces[0].losses, traces[1].losses, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-6)


def test_prepared_weights_leave_the_model_as_it_was() -> None:
    module = build(small_config(backbone=FROZEN), LossConfig(), "bf16", cast=True, fold=True)
    module.train()
    before = dict(module.named_parameters())
    group = batch(0, 1.0, 0).to(torch.device("cpu"))
    module(group, NORM)
    hook = module.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module(group, NORM)
    hook.remove()
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not any(m.folded for m in module.modules() if isinstance(m, FrozenBatchNorm2d))


def test_fold_norms_follows_changed_buffers() -> None:
    module = build(small_config(backbone=FROZEN), LossConfig(), "fp32", cast=False, fold=True)
    plain = build(small_config(backbone=FROZEN), LossConfig(), "fp32", cast=False, fold=False)
    group = batch(0, 1.0, 0).to(torch.device("cpu"))
    module(group, NORM)
    for norm in module.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight.mul_(1.5)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(group, NORM), plain(group, NORM), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("deformable", "norms"), [(False, 53), (True, 40)])
def test_fold_norms_finds_the_norm_of_every_convolution(deformable: bool, norms: int) -> None:
    """A deformable convolution is none that a factor can be folded into; its 13 norms stay."""
    backbone = BackboneConfig(name="resnet50", weights="none", deformable_conv=deformable)
    model = build_model(small_config().model_copy(update={"backbone": backbone}))
    prepared = PreparedWeights(model, None, fold=True)
    assert len(prepared._folds) == norms
    for fold in prepared._folds:
        assert fold.conv.out_channels == len(fold.norm.weight)


@pytest.mark.slow  # traces all layers
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_prepared_weights_can_be_compiled() -> None:
    eager, compiled = (build(small_config(backbone=FROZEN), LossConfig(), "bf16", True, True).train() for _ in range(2))
    compile_regions(compiled.model, backend="aot_eager")
    group = batch(0, 1.0, 0).to(torch.device("cpu"))
    for module in (eager, compiled):
        losses = module(group, NORM)
        torch.autograd.backward(module.criterion.total(losses))
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=2e-2, atol=2e-2 * float(a.grad.abs().max()), msg=name)
    assert isinstance(compiled.model.get_submodule("backbone"), nn.Module)
