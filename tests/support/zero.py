"""A small module with a parameter in each group of the recipe, and a few steps of its training."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import OptimConfig, TrainConfig
from pipeline.engine import zero
from pipeline.engine.backend import OptimizerState
from pipeline.engine.precision import DTYPES
from pipeline.engine.zero import DeepSpeedBackend
from pipeline.runtime import Runtime

GROUPS, STEPS = 3, 4  # 3 groups: two ranks do not divide them, so one runs with weight 0
OPTIM = OptimConfig(lr=1e-2, backbone_lr=1e-3, clip=0.1)
MODES: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3},
    "1 offloaded": {"zero_stage": 1, "offload_optimizer": True},
    "2 offloaded": {"zero_stage": 2, "offload_optimizer": True},
    "3 offloaded": {"zero_stage": 3, "offload_optimizer": True},
    "1 overlapping": {"zero_stage": 1},  # reduced in buckets during backward, as on GPUs
    "2 overlapping": {"zero_stage": 2},
    "3 overlapping": {"zero_stage": 3},
    "0 fp16": {"zero_stage": 0, "precision": "fp16"},
    "1 fp16": {"zero_stage": 1, "precision": "fp16"},
    "3 fp16": {"zero_stage": 3, "precision": "fp16"},
}
BUCKET = 16  # gradients: one of the net's parameters is larger, the others fill several buckets


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
        self.dtype: torch.dtype | None = None

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return (self.model(x).float() - y).abs().sum() / 32  # else fp16 overflows at the first scale


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
    whole = backend.whole_model() if isinstance(backend, DeepSpeedBackend) else module.model
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    return Trace(weights, norms, of_all_ranks(backend.optimizer_state(), world))


def of_all_ranks(state: OptimizerState, world: int) -> OptimizerState:
    """Rank 0's state, as a checkpoint takes it to the other ranks."""
    states = [state]
    if world > 1:
        dist.broadcast_object_list(states)
    return states[0]


def build(runtime: Runtime, mode: str, start: Trace | None = None) -> tuple[DeepSpeedBackend, Module]:
    module = Module()
    if start is not None:
        module.model.load_state_dict(start.weights)
    settings = TrainConfig.model_validate({"global_batch": 2 * GROUPS, "micro_batch": 2, **MODES[mode]})
    module.dtype = DTYPES[settings.precision]
    overlapping = "overlapping" in mode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "overlaps", lambda world, device: overlapping)
        patch.setattr(zero, "BUCKET_ELEMENTS", BUCKET)
        backend = DeepSpeedBackend(module, settings, OPTIM, runtime)  # type: ignore[arg-type]
    trainable = sum(p.numel() for p in Net().parameters() if p.requires_grad)
    wanted = (BUCKET, True) if overlapping else (trainable, False)  # else one message, no 2 GB for it
    assert (backend.engine.zero_reduce_bucket_size(), backend.engine.zero_overlap_comm()) == wanted
    if start is not None:
        backend.load_optimizer_state(start.state)
    return backend, module
