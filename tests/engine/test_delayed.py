"""`train.delay_results`: the device decides whether to update, and results are read after the next step has started."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.worlds import BOXES, OPTIM, STEPS, batches, build

from pipeline.config import TrainConfig, from_dict
from pipeline.engine.backend import Backend, PlainBackend
from pipeline.engine.step import Engine, StepResult
from pipeline.engine.zero import DeepSpeedBackend
from pipeline.errors import ConfigError
from pipeline.runtime import Runtime, single

CPU = torch.device("cpu")
ZERO = TrainConfig(global_batch=2 * len(BOXES), micro_batch=2, zero_stage="auto")


@pytest.mark.parametrize("setting", [{"precision": "fp16"}, {"ema_decay": 0.9}])
def test_delay_results_with_what_needs_the_result_at_once_is_refused(setting: dict[str, Any]) -> None:
    train = {"delay_results": True, "zero_stage": "auto"}
    assert from_dict({"train": train}).train.delay_results
    with pytest.raises(ConfigError, match=f"delay_results.*{next(iter(setting))}"):
        from_dict({"train": {**train, **setting}})


def use_fused(backend: Backend) -> None:
    """The AdamW of a GPU; torch has it for CPUs too."""
    for group in backend.optimizer.param_groups:
        group["fused"] = True


def train(runtime: Runtime, delay: bool, deepspeed: bool, spoil: int = -1) -> tuple[list[StepResult], Any]:
    """The results of some steps, each read after the next one was started, and the weights."""
    torch.set_num_threads(1)
    module = build("deformable_detr", "fp32")
    if deepspeed:
        backend: Any = DeepSpeedBackend(module, ZERO, OPTIM, runtime)
    else:
        backend = PlainBackend(module, OPTIM, CPU)
    use_fused(backend)
    engine = Engine(module, backend, runtime, seed=0, delay=delay)
    assert engine.delays == delay
    pending = []
    results = []
    for step in range(STEPS):
        groups = [group.to(CPU) for group in batches(runtime.rank, runtime.world, step)]
        if step == spoil:
            groups[0].images[0] = float("nan")
        stop = (runtime.rank, step) == (runtime.world - 1, 1)
        pending.append(engine.start_step(groups, step, stop))
        if step:
            results.append(pending[step - 1].read())
    results.append(pending[-1].read())
    return results, {name: p.detach().clone() for name, p in module.model.named_parameters()}


def assert_same(a: tuple[list[StepResult], Any], b: tuple[list[StepResult], Any]) -> None:
    for one, other in zip(a[0], b[0], strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-5, abs=1e-6, nan_ok=True)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5, nan_ok=True)
        assert (other.applied, other.stop, other.image_ids) == (one.applied, one.stop, one.image_ids)
    for name, weight in a[1].items():
        torch.testing.assert_close(b[1][name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("spoil", [-1, 1])
def test_delayed_steps_have_the_same_results_and_skip_the_same_updates(spoil: int) -> None:
    """The step with NaN changes neither weights nor moments, and the next one is as after a skipped step."""
    at_once, delayed = (train(single(), delay, deepspeed=False, spoil=spoil) for delay in (False, True))
    assert [result.applied for result in delayed[0]] == [step != spoil for step in range(STEPS)]
    assert_same(at_once, delayed)


def on_ranks(runtime: Runtime) -> Any:
    return train(runtime, True, deepspeed=True, spoil=1)


def test_delayed_deepspeed_on_two_ranks_equals_one_plain_process(tmp_path: Path) -> None:
    plain = train(single(), False, deepspeed=False, spoil=1)
    for results, weights in run_ranks(on_ranks, 2, tmp_path):
        assert [r.applied for r in results] == [True, False, True]
        assert [r.losses["loss"] for r in results] == pytest.approx(
            [r.losses["loss"] for r in plain[0]], rel=1e-4, nan_ok=True
        )
        assert [r.stop for r in results] == [False, True, False]
        for name, weight in plain[1].items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_delay_means_nothing_where_deepspeed_divides_the_optimizer(stage: int, tmp_path: Path) -> None:
    assert run_ranks(delays_at, 1, tmp_path, stage) == [False]


def delays_at(runtime: Runtime, stage: int) -> bool:
    module = build("deformable_detr", "fp32")
    train_config = ZERO.model_copy(update={"zero_stage": stage})
    backend = DeepSpeedBackend(module, train_config, OPTIM, runtime)
    use_fused(backend)
    return Engine(module, backend, runtime, seed=0, delay=True).delays
