"""One optimizer step over a list of pad groups; runs with DeepSpeed (`zero.py`) or plain PyTorch, with or without Ray.

The loss and gradient of a step are the same, to rounding, at every world size: the groups are given, dropout is seeded
by (seed, step, group), and losses are normalised over the whole step. Used by `worker.py`, tests, benchmarks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import OptimConfig
from pipeline.data.loader import Batch
from pipeline.model.losses import SetCriterion
from pipeline.optim import build_optimizer
from pipeline.runtime import Runtime

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's first and second moment


@dataclass(frozen=True)
class OptimizerState:
    """Adam's state, free of world size and ZeRO stage: `step`, and `"exp_avg/<parameter name>"` tensors."""

    step: int
    moments: dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepOutcome:
    """Whether the update was applied, and the gradient's global norm before clipping."""

    applied: bool
    grad_norm: float


class Backend(Protocol):
    """What the engine needs to turn losses into an update."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose `param_groups` hold the learning rates."""

    def forward(self, *args: Any) -> Any:
        """Run the module."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one pad group's loss."""

    def step(self) -> StepOutcome:
        """Clip and update; a non-finite gradient changes nothing."""

    def optimizer_state(self) -> OptimizerState:
        """The whole optimizer state (collective)."""

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take over `state`."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `losses` are the step's own values, equal on all ranks."""

    applied: bool
    grad_norm: float
    losses: dict[str, float]
    image_ids: list[int]  # of this rank's groups


@dataclass(frozen=True)
class StepNorm:
    """What a criterion divides by: counts of the whole step over all ranks, float scalars on the device."""

    num_boxes: torch.Tensor  # ground-truth boxes, at least 1
    groups: torch.Tensor  # pad groups, those of weight 0 not among them


class LossModule(nn.Module):
    """Model and criterion as one module, so that a backend sees a single forward; autocast lives inside it."""

    def __init__(self, model: nn.Module, criterion: SetCriterion, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self._bf16 = bf16

    def forward(self, batch: Batch, norm: StepNorm) -> dict[str, torch.Tensor]:
        """Unweighted losses of one pad group, which add up to those of the whole step."""
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self._bf16):
            outputs = self.model(batch.images, batch.mask)
        return self.criterion(outputs, batch.targets, norm.num_boxes, norm.groups)


class Engine:
    """Runs optimizer steps of one rank."""

    def __init__(self, module: LossModule, backend: Backend, runtime: Runtime, seed: int) -> None:
        self.module = module
        self.backend = backend
        self._runtime = runtime
        self._seed = seed

    def train_step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """One optimizer step over this rank's pad groups of global step `step`.

        Weight-0 groups (the world size does not divide the groups) run for their collectives and add nothing.
        """
        self.module.train()
        batches = [batch.to(self._runtime.device) for batch in batches]
        norm = self._norm_of_step(batches)
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            torch.manual_seed(dropout_seed(self._seed, step, batch.group))
            losses = self.backend.forward(batch, norm)
            self.backend.backward(self.module.criterion.total(losses) * batch.weight)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * batch.weight
        outcome = self.backend.step()
        return StepResult(
            outcome.applied,
            outcome.grad_norm,
            self._reduce(sums, norm),
            [int(i) for batch in batches for i in batch.image_ids],
        )

    def _norm_of_step(self, batches: Sequence[Batch]) -> StepNorm:
        boxes = float(sum(len(batch.labels) * batch.weight for batch in batches))
        totals = torch.tensor([boxes, sum(batch.weight for batch in batches)], device=self._runtime.device)
        if self._runtime.world > 1:
            dist.all_reduce(totals)
        return StepNorm(totals[0].clamp(min=1), totals[1])

    def _reduce(self, sums: dict[str, torch.Tensor], norm: StepNorm) -> dict[str, float]:
        """Add the ranks' losses; logging values that are no losses (class_error, ...) become means over groups."""
        packed = torch.stack([*sums.values()])
        if self._runtime.world > 1:
            dist.all_reduce(packed)
        *values, count = torch.cat([packed, norm.groups[None]]).tolist()  # one wait for the device
        losses = {
            name: value if name.startswith("loss_") else value / count for name, value in zip(sums, values, strict=True)
        }
        weights = self.module.criterion.weight_dict
        return {"loss": sum(weights[name] * losses[name] for name in losses if name in weights), **losses}


def dropout_seed(seed: int, step: int, group: int) -> int:
    """The random stream of one pad group in one step, the same whichever rank runs it."""
    return int(np.random.SeedSequence([seed, step, group]).generate_state(1, np.uint64)[0] >> 1)


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale all gradients to a global norm of at most `limit` (0 = leave them); returns the norm before."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    return float(nn.utils.clip_grad_norm_(parameters, limit or math.inf))


class PlainBackend:
    """AdamW without DeepSpeed, one process: what benchmarks and tests compare with."""

    def __init__(self, module: LossModule, optim: OptimConfig, device: torch.device) -> None:
        self._module = module
        self._model = module.model
        self._clip = optim.clip
        self._optimizer = build_optimizer(module.model, optim, device)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW itself."""
        return self._optimizer

    def forward(self, *args: Any) -> Any:
        """The module's forward."""
        return self._module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate."""
        loss.backward()

    def step(self) -> StepOutcome:
        """Clip and update, unless the gradient is not finite."""
        norm = clip_gradients(self._model, self._clip)
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return StepOutcome(math.isfinite(norm), norm)

    def optimizer_state(self) -> OptimizerState:
        """Moments by parameter name."""
        names: dict[torch.Tensor, str] = {p: n for n, p in self._model.named_parameters()}
        state = self._optimizer.state
        moments = {
            f"{key}/{names[p]}": s[key].detach().to("cpu", copy=True) for p, s in state.items() for key in MOMENTS
        }
        return OptimizerState(max((int(s["step"]) for s in state.values()), default=0), moments)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take over moments by parameter name; parameters without any start fresh."""
        for name, parameter in self._model.named_parameters():
            if f"{MOMENTS[0]}/{name}" in state.moments:
                moments = {key: state.moments[f"{key}/{name}"].to(parameter.device).clone() for key in MOMENTS}
                fused = self._optimizer.param_groups[0]["fused"]
                step = torch.tensor(float(state.step), device=parameter.device if fused else "cpu")
                self._optimizer.state[parameter] = {"step": step, **moments}
