"""One global batch at every world size: the same losses, the same gradient, the same weights after three steps.

Five pad groups of two images, which no world size but 1 and 5 divides; boxes are uneven, and some ranks have none.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.baselines import NAMES, small
from support.distributed import run_ranks
from support.worlds import BOXES, MODELS, OPTIM, Trace, batch, batches, build, run, run_plain

from pipeline.config import Precision, TrainConfig
from pipeline.engine import zero
from pipeline.engine.module import LossModule, StepNorm
from pipeline.engine.zero import DeepSpeedBackend
from pipeline.model import OwnLosses, build_criterion, build_model
from pipeline.runtime import Runtime

MODES: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "ZeRO 1 offloaded": {"zero_stage": 1, "offload_optimizer": True},
    "ZeRO 3 offloaded": {"zero_stage": 3, "offload_optimizer": True},
    "ZeRO 1 bf16": {"zero_stage": 1, "precision": "bf16"},
    "ZeRO 3 bf16": {"zero_stage": 3, "precision": "bf16"},
    "ZeRO 1 fp16": {"zero_stage": 1, "precision": "fp16"},
    "ZeRO 3 fp16": {"zero_stage": 3, "precision": "fp16"},
    "ZeRO 1 overlapping": {"zero_stage": 1},  # reduced in buckets during backward, as on GPUs
    "ZeRO 2 overlapping": {"zero_stage": 2},
    "ZeRO 3 overlapping": {"zero_stage": 3},
    "ZeRO 1 bf16 overlapping": {"zero_stage": 1, "precision": "bf16"},
}
BUCKET = 10_000  # gradients, of some 10^5: many buckets
QUICK = ("ZeRO 1", "ZeRO 3", "ZeRO 1 overlapping", "ZeRO 1 bf16", "ZeRO 1 fp16")


def run_deepspeed(runtime: Runtime, name: str, mode: str) -> Trace:
    train = TrainConfig.model_validate({"global_batch": 2 * len(BOXES), "micro_batch": 2, **MODES[mode]})
    module = build(name, train.precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "overlaps", lambda world, device: "overlapping" in mode)
        patch.setattr(zero, "BUCKET_ELEMENTS", BUCKET)
        backend = DeepSpeedBackend(module, train, OPTIM, runtime)
    assert (backend.engine.zero_reduce_bucket_size() == BUCKET) == backend.engine.zero_overlap_comm()
    assert backend.engine.zero_overlap_comm() == ("overlapping" in mode)
    return run(module, backend, runtime)


def gradient(runtime: Runtime, name: str) -> dict[str, torch.Tensor]:
    """The gradient of one step. Without ZeRO its sum over ranks lies in `.grad` when the engine asks for a step."""
    train = TrainConfig(global_batch=2 * len(BOXES), micro_batch=2, zero_stage=0)
    module = build(name, "fp32")
    backend = DeepSpeedBackend(module, train, OPTIM, runtime)
    found: dict[str, torch.Tensor] = {}
    step = backend.step

    def spy() -> Any:
        found.update({n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None})
        return step()

    backend.step = spy  # type: ignore[method-assign]
    run(module, backend, runtime, steps=1)
    return found


def plain_gradient(name: str) -> dict[str, torch.Tensor]:
    """The definition, without any of the engine: the sum of the groups' losses, over one division by all boxes."""
    from pipeline.engine.step import dropout_seed

    module = build(name, "fp32").train()
    norm = StepNorm(torch.tensor(float(sum(map(sum, BOXES)))), torch.tensor(float(len(BOXES))))
    for group in range(len(BOXES)):
        torch.manual_seed(dropout_seed(0, 0, group))
        module.criterion.total(module(batch(group, 1.0, 0).to(torch.device("cpu")), norm)).backward()
    return {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}


def everything(runtime: Runtime, modes: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Trace]]:
    zero.KEEP_WHOLE = 0  # else ZeRO 3 divides next to nothing of nets this small
    gradients = {name: gradient(runtime, name) for name in MODELS}
    return gradients, {mode: run_deepspeed(runtime, "deformable_detr", mode) for mode in modes}


@pytest.mark.parametrize(
    ("world", "modes"),
    [
        (2, QUICK),
        pytest.param(1, tuple(MODES), marks=pytest.mark.slow),
        pytest.param(2, tuple(MODES), marks=pytest.mark.slow),
        pytest.param(3, tuple(MODES), marks=pytest.mark.slow),
        pytest.param(4, tuple(MODES), marks=pytest.mark.slow),
    ],
)
def test_gradient_and_three_steps_equal_one_plain_process(world: int, modes: tuple[str, ...], tmp_path: Path) -> None:
    wanted = {name: plain_gradient(name) for name in MODELS}
    plain: dict[Precision, Trace] = {p: run_plain("deformable_detr", p) for p in ("fp32", "bf16", "fp16")}
    for gradients, traces in run_ranks(everything, world, tmp_path, modes):
        for name, grads in gradients.items():
            assert grads.keys() == wanted[name].keys()
            scale = max(float(g.abs().max()) for g in wanted[name].values())
            for key, grad in grads.items():
                torch.testing.assert_close(grad, wanted[name][key], rtol=1e-4, atol=1e-6 * scale, msg=f"{name} {key}")
        for mode, trace in traces.items():
            precision: Precision = MODES[mode].get("precision", "fp32")
            compare_first_step(trace, plain[precision], mode)
            if "ZeRO 3" not in mode or precision == "fp32":
                compare_all_steps(trace, plain[precision], mode, fp16=precision == "fp16")


def compare_first_step(trace: Trace, plain: Trace, mode: str) -> None:
    """ZeRO 3 adds a layer's gradients up in another order, and low precision rounds each sum: 0.02% of the norm."""
    assert trace.losses[0] == pytest.approx(plain.losses[0], rel=1e-5, abs=1e-5), mode
    assert trace.applied[0] == plain.applied[0]
    if plain.applied[0]:
        assert trace.norms[0] == pytest.approx(plain.norms[0], rel=1e-3), mode


def compare_all_steps(trace: Trace, plain: Trace, mode: str, fp16: bool) -> None:
    """In fp16 a weight that an update left 1e-7 apart may be rounded the other way from then on.

    How often, depends on the processor's matrix product. Counts (`cardinality_error`) then jump, losses move by 1e-4
    and the norm of the gradient by 0.2%; AdamW makes whole steps of gradients near 0, so weights are not compared.
    """
    assert trace.applied == plain.applied, mode
    for step, (a, b) in enumerate(zip(plain.losses, trace.losses, strict=True)):
        assert b.keys() == a.keys()
        rounded = fp16 and step > 0
        for name in a:
            if not (rounded and name.startswith("cardinality")):
                near = pytest.approx(a[name], rel=2e-4 if rounded else 1e-5, abs=1e-5)
                assert b[name] == near, (mode, step, name)
    for a, b, applied in zip(plain.norms, trace.norms, plain.applied, strict=True):
        assert not applied or b == pytest.approx(a, rel=5e-3 if fp16 else 1e-4), mode
    if not fp16:
        for name, weight in trace.weights.items():
            torch.testing.assert_close(weight, plain.weights[name], rtol=1e-5, atol=1e-5, msg=f"{mode} {name}")


def test_batch_of_this_test_is_uneven() -> None:
    ranks = [[sum(len(b.labels) * b.weight for b in batches(rank, 2, 0))] for rank in range(2)]
    assert ranks == [[23], [0]]
    assert {b.weight for rank in range(4) for b in batches(rank, 4, 0)} == {0.0, 1.0}


def family(name: str) -> LossModule:
    if name in NAMES:
        return LossModule(small(name), OwnLosses())
    model, loss = MODELS[name.removesuffix(" recomputed")]
    recompute = "recomputed" in name
    return LossModule(build_model(model.model_copy(update={"checkpoint_encoder": recompute})), build_criterion(loss))


@pytest.mark.parametrize("name", [*MODELS, "deformable_detr recomputed", *NAMES])
def test_backward_order_of_gradients_is_the_same_with_and_without_boxes(name: str) -> None:
    """What is reduced during backward is sent in this order: ranks with other images must agree on it."""
    orders = []
    for group in range(len(BOXES)):
        module = family(name).train()
        order: list[str] = []
        for key, parameter in module.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, key=key, order=order: order.append(key))
        norm = StepNorm(torch.tensor(float(sum(map(sum, BOXES)))), torch.tensor(float(len(BOXES))))
        torch.manual_seed(0)
        module.criterion.total(module(batch(group, 1.0, 0), norm)).backward()
        orders.append(order)
    assert {*orders[0]} == {key for key, p in module.model.named_parameters() if p.requires_grad}
    assert all(order == orders[0] for order in orders)
