"""DeepSpeed's gradients, updates and optimizer state against plain PyTorch, over ranks and ZeRO stages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_distributed import run_ranks
from torch import nn

from pipeline.config import OptimConfig, TrainConfig
from pipeline.engine import OptimizerState, PlainBackend
from pipeline.runtime import Runtime, single
from pipeline.zero import DeepSpeedBackend, accumulation, deepspeed_config

GROUPS, STEPS = 3, 4  # 3 groups: two ranks do not divide them, so one runs with weight 0
OPTIM = OptimConfig(lr=1e-2, backbone_lr=1e-3, clip=0.1)
STAGES = (0, 1, 2)


class Net(nn.Module):
    """Has a parameter in each of the recipe's groups, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 5)
        self.sampling_offsets = nn.Linear(5, 3)
        self.head = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.sampling_offsets(torch.tanh(self.backbone(x))))) * self.frozen


class Module(nn.Module):
    """Stands for engine.LossModule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Net()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.model(x) - y).abs().sum()


@dataclass
class Trace:
    weights: dict[str, torch.Tensor]
    norms: list[float]
    state: OptimizerState


def train(backend: Any, module: Module, rank: int, world: int, steps: range, spoil: int = -1) -> Trace:
    norms = []
    for step in steps:
        for micro in range(-(-GROUPS // world)):
            group = micro * world + rank
            random = torch.Generator().manual_seed(100 * step + group % GROUPS)
            x, y = torch.randn(6, 4, generator=random), torch.randn(6, 2, generator=random)
            loss = backend.forward(x, y) * (float("nan") if step == spoil and group == 1 else 1.0)
            backend.backward(loss * float(group < GROUPS))
        outcome = backend.step()
        assert outcome.applied == (step != spoil)
        norms.append(outcome.grad_norm)
    weights = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    return Trace(weights, norms, backend.optimizer_state())


def deepspeed_backend(runtime: Runtime, stage: int) -> tuple[DeepSpeedBackend, Module]:
    module = Module()
    settings = TrainConfig(global_batch=2 * GROUPS, micro_batch=2, zero_stage=stage)
    return DeepSpeedBackend(module, settings, OPTIM, runtime), module


def scenarios(runtime: Runtime) -> dict[str, Trace]:
    """Everything two ranks are asked to show, in one start of DeepSpeed."""
    traces = {}
    where = (runtime.rank, runtime.world)
    for stage in STAGES:
        backend, module = deepspeed_backend(runtime, stage)
        half = train(backend, module, *where, range(STEPS // 2))
        traces[f"half {stage}"] = half
        traces[f"full {stage}"] = train(backend, module, *where, range(STEPS // 2, STEPS))
        backend, module = deepspeed_backend(runtime, stage)
        module.model.load_state_dict(half.weights)
        backend, module = restored(runtime, stage, half)
        traces[f"resumed {stage}"] = train(backend, module, *where, range(STEPS // 2, STEPS))
        backend, module = restored(runtime, (stage + 1) % 3, half)
        traces[f"moved {stage}"] = train(backend, module, *where, range(STEPS // 2, STEPS))
        backend, module = deepspeed_backend(runtime, stage)
        traces[f"spoiled {stage}"] = train(backend, module, *where, range(STEPS), spoil=1)
    return traces


def restored(runtime: Runtime, stage: int, trace: Trace) -> tuple[DeepSpeedBackend, Module]:
    module = Module()
    module.model.load_state_dict(trace.weights)
    settings = TrainConfig(global_batch=2 * GROUPS, micro_batch=2, zero_stage=stage)
    backend = DeepSpeedBackend(module, settings, OPTIM, runtime)
    backend.load_optimizer_state(trace.state)
    return backend, module


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Trace]]:
    folder: Path = tmp_path_factory.mktemp("zero")
    return run_ranks(scenarios, 2, folder)


@pytest.fixture(scope="module")
def plain() -> dict[str, Trace]:
    traces = {}
    for name, spoil in (("full", -1), ("spoiled", 1)):
        module = Module()
        traces[name] = train(PlainBackend(module, OPTIM, single().device), module, 0, 1, range(STEPS), spoil)
    return traces


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_plain_pytorch(ranks: list[dict[str, Trace]], plain: dict[str, Trace], stage: int) -> None:
    full = ranks[0][f"full {stage}"]
    assert_same(full.weights, plain["full"].weights, 1e-5)
    assert_same(full.state.moments, plain["full"].state.moments, 1e-4)
    assert full.state.step == STEPS
    assert full.norms == pytest.approx(plain["full"].norms[STEPS // 2 :], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_equal(ranks: list[dict[str, Trace]], stage: int) -> None:
    for rank in ranks:
        full, resumed = rank[f"full {stage}"], rank[f"resumed {stage}"]
        assert all(torch.equal(full.weights[n], resumed.weights[n]) for n in full.weights)
        assert all(torch.equal(full.state.moments[n], resumed.state.moments[n]) for n in full.state.moments)


@pytest.mark.parametrize("stage", STAGES)
def test_state_moves_to_another_stage(ranks: list[dict[str, Trace]], stage: int) -> None:
    assert_same(ranks[1][f"moved {stage}"].weights, ranks[1][f"full {stage}"].weights, 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_state_moves_to_one_process(ranks: list[dict[str, Trace]], stage: int) -> None:
    half = ranks[0][f"half {stage}"]
    module = Module()
    module.model.load_state_dict(half.weights)
    backend = PlainBackend(module, OPTIM, single().device)
    backend.load_optimizer_state(half.state)
    moved = train(backend, module, 0, 1, range(STEPS // 2, STEPS))
    assert_same(moved.weights, ranks[0][f"full {stage}"].weights, 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_non_finite_gradient_changes_nothing(
    ranks: list[dict[str, Trace]], plain: dict[str, Trace], stage: int
) -> None:
    spoiled = ranks[0][f"spoiled {stage}"]
    assert spoiled.state.step == STEPS - 1
    assert_same(spoiled.weights, plain["spoiled"].weights, 1e-5)


@pytest.mark.parametrize("world", range(1, 9))
def test_batch_arithmetic_adds_up(world: int) -> None:
    train_config = TrainConfig(global_batch=16, micro_batch=2)
    settings = deepspeed_config(train_config, OPTIM, world)
    assert settings["gradient_accumulation_steps"] * world >= 8
    assert (accumulation(train_config, world) - 1) * world < 8
    product = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * world
    assert settings["train_batch_size"] == product
