"""The interface that turns the losses of a step into an update, and plain AdamW; DeepSpeed's is in `zero.py`.

The engine knows the interface only. Optimizer state is saved and loaded by parameter name. A gradient that is not
finite changes nothing, and the outcome says so.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from pipeline.config import OptimConfig, Precision
from pipeline.data.batch import Batch
from pipeline.engine.module import LossModule, StepNorm
from pipeline.engine.optim import build_optimizer
from pipeline.engine.precision import LossScale, initial_scale

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's first and second moment


@dataclass(frozen=True)
class OptimizerState:
    """Adam's state, independent of world size and ZeRO stage: `step`, and `"exp_avg/<parameter name>"` tensors."""

    step: int
    moments: dict[str, torch.Tensor]
    loss_scale: LossScale | None = None  # of fp16


@dataclass(frozen=True)
class StepOutcome:
    """Whether the update was applied, and the gradient's global norm before clipping."""

    applied: bool
    grad_norm: float
    rescaled: bool = False  # not applied, perhaps only because the fp16 loss scale was too large; the next is smaller


class Backend(Protocol):
    """What the engine needs to turn losses into an update."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose `param_groups` hold the learning rates."""

    def forward(self, batch: Batch, norm: StepNorm) -> dict[str, torch.Tensor]:
        """Run the module: the losses of one pad group."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one pad group's loss."""

    def step(self) -> StepOutcome:
        """Clip and update; a non-finite gradient changes nothing."""

    @property
    def updates_alone(self) -> bool:
        """Whether `step_alone` can be used."""

    def step_alone(self) -> torch.Tensor:
        """As `step` without a wait: the device decides. Returns the gradient's norm before clipping, a scalar there."""

    def optimizer_state(self) -> OptimizerState:
        """The whole optimizer state on rank 0; other ranks get no moments (collective)."""

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Load `state`."""


def outcome_of(applied: bool, norm: float, scale: LossScale | None) -> StepOutcome:
    """The outcome of a step that ran with `scale`."""
    return StepOutcome(applied, norm, rescaled=not applied and scale is not None and scale.can_shrink)


def clip_gradients(model: nn.Module, limit: float, scale: float = 1.0) -> float:
    """Divide all gradients by `scale`, then limit their global norm to `limit` (0 = no limit).

    Returns the norm before it was limited.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    if scale != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / scale)
    return float(nn.utils.clip_grad_norm_(parameters, limit or math.inf))


def clip_on_device(model: nn.Module, optimizer: torch.optim.Optimizer, limit: float) -> torch.Tensor:
    """Limit the global norm of the gradients, and let the fused `optimizer` skip its next step if it is not finite.

    Nothing is read by the host. Returns the norm before it was limited.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    finite = norm * 0  # else NaN
    optimizer.found_inf = (finite != 0).float()  # type: ignore[attr-defined]  # read by torch's fused optimizers
    return norm


class PlainBackend:
    """AdamW without DeepSpeed, in one process; benchmarks and tests compare with it."""

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

    def forward(self, batch: Batch, norm: StepNorm) -> dict[str, torch.Tensor]:
        """The module's forward."""
        losses: dict[str, torch.Tensor] = self._module(batch, norm)
        return losses

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate."""
        torch.autograd.backward(loss * self._scale.scale if self._scale else loss)

    def step(self) -> StepOutcome:
        """Clip and update, unless the gradient is not finite."""
        norm = clip_gradients(self._model, self._clip, self._scale.scale if self._scale else 1.0)
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        outcome = outcome_of(math.isfinite(norm), norm, self._scale)
        self._scale = self._scale and self._scale.after(outcome.applied)
        return outcome

    @property
    def updates_alone(self) -> bool:
        """With the fused AdamW, except for fp16, whose loss scale the host chooses."""
        return bool(self._optimizer.param_groups[0]["fused"]) and self._scale is None

    def step_alone(self) -> torch.Tensor:
        """Clip and update on the device."""
        norm = clip_on_device(self._model, self._optimizer, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def optimizer_state(self) -> OptimizerState:
        """Moments by parameter name."""
        names: dict[torch.Tensor, str] = {p: n for n, p in self._model.named_parameters()}
        state = self._optimizer.state
        moments = {
            f"{key}/{names[p]}": s[key].detach().to("cpu", copy=True) for p, s in state.items() for key in MOMENTS
        }
        return OptimizerState(max((int(s["step"]) for s in state.values()), default=0), moments, self._scale)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Load moments by parameter name; parameters without moments start with zeros."""
        self._scale = self._scale and (state.loss_scale or self._scale)
        for name, parameter in self._model.named_parameters():
            if f"{MOMENTS[0]}/{name}" in state.moments:
                moments = {key: state.moments[f"{key}/{name}"].to(parameter.device).clone() for key in MOMENTS}
                fused = self._optimizer.param_groups[0]["fused"]
                step = torch.tensor(float(state.step), device=parameter.device if fused else "cpu")
                self._optimizer.state[parameter] = {"step": step, **moments}
