"""One optimizer step over a list of pad groups; runs with DeepSpeed (`zero.py`) or plain PyTorch, with or without Ray.

The loss and gradient of a step are the same, to rounding, at every world size: the groups are given, dropout is seeded
by (seed, step, group), and losses are normalised over the whole step. Used by `worker.py`, tests, benchmarks.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import OptimConfig, Precision
from pipeline.data.batch import Batch
from pipeline.model import Detector, OwnLosses, SetCriterion
from pipeline.optim import build_optimizer
from pipeline.runtime import Runtime
from pipeline.training.precision import DTYPES, LossScale, initial_scale

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's first and second moment


@dataclass(frozen=True)
class OptimizerState:
    """Adam's state, free of world size and ZeRO stage: `step`, and `"exp_avg/<parameter name>"` tensors."""

    step: int
    moments: dict[str, torch.Tensor]
    loss_scale: LossScale | None = None  # of fp16


@dataclass(frozen=True)
class StepOutcome:
    """Whether the update was applied, and the gradient's global norm before clipping."""

    applied: bool
    grad_norm: float
    rescaled: bool = False  # not applied, but only the fp16 loss scale may have been too large: the next one is smaller


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
    rescaled: bool = False  # see StepOutcome
    stop: bool = False  # a rank was asked to leave: all do, after this step
    forward_seconds: float = 0.0  # of this rank's forward passes: its own work, before it waits for other ranks


@dataclass(frozen=True)
class StepNorm:
    """What a criterion divides by: counts of the whole step over all ranks, float scalars on the device."""

    num_boxes: torch.Tensor  # ground-truth boxes, at least 1
    groups: torch.Tensor  # pad groups, those of weight 0 not among them
    stops: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # ranks asked to leave: no sum of its own


class LossModule(nn.Module):
    """Model and criterion as one module, so that a backend sees a single forward; autocast lives inside it."""

    def __init__(self, model: Detector, criterion: SetCriterion | OwnLosses, precision: Precision = "fp32") -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self._dtype = DTYPES[precision]

    def forward(self, batch: Batch, norm: StepNorm) -> dict[str, torch.Tensor]:
        """Unweighted losses of one pad group, which add up to those of the whole step."""
        with torch.autocast(batch.images.device.type, self._dtype, enabled=self._dtype is not None):
            targets = batch.targets if self.model.takes_targets else None
            outputs = self.model(batch.images, batch.mask, targets)
        return self.criterion(outputs, batch.targets, norm.num_boxes, norm.groups)


class Engine:
    """Runs optimizer steps of one rank."""

    def __init__(self, module: LossModule, backend: Backend, runtime: Runtime, seed: int) -> None:
        self.module = module
        self.backend = backend
        self._runtime = runtime
        self._seed = seed

    def train_step(self, batches: Sequence[Batch], step: int, stop: bool = False) -> StepResult:
        """One optimizer step over this rank's pad groups of global step `step`; `stop` if this rank wants to leave.

        Weight-0 groups (the world size does not divide the groups) run for their collectives and add nothing.
        """
        self.module.train()
        norm = self._norm_of_step(batches, stop)
        sums: dict[str, torch.Tensor] = {}
        seconds = 0.0
        for batch in batches:
            torch.manual_seed(dropout_seed(self._seed, step, batch.group))
            start = time.perf_counter()
            losses = self.backend.forward(batch.to(self._runtime.device), norm)
            seconds += time.perf_counter() - start  # the matcher has waited for the device
            self.backend.backward(self.module.criterion.total(losses) * batch.weight)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * batch.weight
        outcome = self.backend.step()
        losses, stops = self._reduce(sums, norm)
        return StepResult(
            outcome.applied,
            outcome.grad_norm,
            losses,
            [int(i) for batch in batches for i in batch.image_ids],
            outcome.rescaled,
            stop=stops > 0,
            forward_seconds=seconds,
        )

    def inspect(
        self, batches: Sequence[Batch], step: int, summary: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Run the forward pass of a step that was not applied again: per pad group of this rank what came out.

        All ranks must call it, with what they gave to `train_step`.
        """
        batches = [batch.to(self._runtime.device) for batch in batches]
        norm = self._norm_of_step(batches)
        outputs: list[Any] = []
        hook = self.module.model.register_forward_hook(lambda module, args, output: outputs.append(output))
        found = []
        with torch.no_grad(), hook:
            for batch in batches:
                torch.manual_seed(dropout_seed(self._seed, step, batch.group))
                losses = self.module(batch, norm)
                found.append(
                    {
                        "group": batch.group,
                        "weight": batch.weight,
                        "image_ids": batch.image_ids.tolist(),
                        "losses": summary(losses),
                        "outputs": summary({"output": outputs.pop()} if outputs else {}),
                    }
                )
        return found

    def _norm_of_step(self, batches: Sequence[Batch], stop: bool = False) -> StepNorm:
        boxes = float(sum(len(batch.labels) * batch.weight for batch in batches))
        groups = float(sum(batch.weight for batch in batches))
        totals = torch.tensor([boxes, groups, float(stop)], device=self._runtime.device)
        if self._runtime.world > 1:
            dist.all_reduce(totals)
        return StepNorm(totals[0].clamp(min=1), totals[1], totals[2])

    def _reduce(self, sums: dict[str, torch.Tensor], norm: StepNorm) -> tuple[dict[str, float], float]:
        """Add the ranks' losses; logging values that are no losses (class_error, ...) become means over groups.

        The second value is the number of ranks that want to leave.
        """
        packed = torch.stack([*sums.values()])
        if self._runtime.world > 1:
            dist.all_reduce(packed)
        *values, count, stops = torch.cat([packed, norm.groups[None], norm.stops[None]]).tolist()  # one wait
        losses = {
            name: value if name.startswith("loss_") else value / count for name, value in zip(sums, values, strict=True)
        }
        weights = self.module.criterion.weight_dict
        return {"loss": sum(weights[name] * losses[name] for name in losses if name in weights), **losses}, stops


def dropout_seed(seed: int, step: int, group: int) -> int:
    """The random stream of one pad group in one step, the same whichever rank runs it."""
    return int(np.random.SeedSequence([seed, step, group]).generate_state(1, np.uint64)[0] >> 1)


def outcome_of(applied: bool, norm: float, scale: LossScale | None) -> StepOutcome:
    """The outcome of a step that ran with `scale`."""
    return StepOutcome(applied, norm, rescaled=not applied and scale is not None and scale.can_shrink)


def clip_gradients(model: nn.Module, limit: float, scale: float = 1.0) -> float:
    """Divide all gradients by `scale`, then bring their global norm to at most `limit` (0 = leave it).

    Returns the norm before it was limited.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    if scale != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / scale)
    return float(nn.utils.clip_grad_norm_(parameters, limit or math.inf))


class PlainBackend:
    """AdamW without DeepSpeed, one process: what benchmarks and tests compare with."""

    def __init__(
        self, module: LossModule, optim: OptimConfig, device: torch.device, precision: Precision = "fp32"
    ) -> None:
        self._module = module
        self._model = module.model
        self._clip = optim.clip
        self._optimizer = build_optimizer(module.model, optim, device)
        self._scale = initial_scale(precision)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW itself."""
        return self._optimizer

    def forward(self, *args: Any) -> Any:
        """The module's forward."""
        return self._module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate."""
        (loss * self._scale.scale if self._scale else loss).backward()

    def step(self) -> StepOutcome:
        """Clip and update, unless the gradient is not finite."""
        norm = clip_gradients(self._model, self._clip, self._scale.scale if self._scale else 1.0)
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        outcome = outcome_of(math.isfinite(norm), norm, self._scale)
        self._scale = self._scale and self._scale.after(outcome.applied)
        return outcome

    def optimizer_state(self) -> OptimizerState:
        """Moments by parameter name."""
        names: dict[torch.Tensor, str] = {p: n for n, p in self._model.named_parameters()}
        state = self._optimizer.state
        moments = {
            f"{key}/{names[p]}": s[key].detach().to("cpu", copy=True) for p, s in state.items() for key in MOMENTS
        }
        return OptimizerState(max((int(s["step"]) for s in state.values()), default=0), moments, self._scale)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take over moments by parameter name; parameters without any start fresh."""
        self._scale = self._scale and (state.loss_scale or self._scale)
        for name, parameter in self._model.named_parameters():
            if f"{MOMENTS[0]}/{name}" in state.moments:
                moments = {key: state.moments[f"{key}/{name}"].to(parameter.device).clone() for key in MOMENTS}
                fused = self._optimizer.param_groups[0]["fused"]
                step = torch.tensor(float(state.step), device=parameter.device if fused else "cpu")
                self._optimizer.state[parameter] = {"step": step, **moments}
