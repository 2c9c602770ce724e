"""DeepSpeed from the config: the one place where batch arithmetic and ZeRO settings become DeepSpeed's dict.

`DeepSpeedBackend` is what `engine.py` calls to turn a loss into an optimizer step; `engine.PlainBackend` is its twin
without DeepSpeed. Optimizer state leaves and enters by parameter name, so a checkpoint fits any world size and stage.
"""

import math
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from torch import nn

from pipeline.config import OptimConfig, TrainConfig
from pipeline.engine import MOMENTS, LossModule, OptimizerState, StepOutcome, clip_gradients
from pipeline.errors import CheckpointError
from pipeline.optim import build_optimizer
from pipeline.runtime import Runtime


def accumulation(train: TrainConfig, world: int) -> int:
    """Pad groups each rank runs per optimizer step, weight-0 ones included."""
    return math.ceil(train.global_batch // train.micro_batch / world)


def deepspeed_config(train: TrainConfig, optim: OptimConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's settings for `world` ranks.

    Precision is absent on purpose: parameters stay fp32 and the engine autocasts inside its own forward, so that
    coordinates, boxes, matcher and losses keep fp32 whatever the backend is.
    """
    steps = accumulation(train, world)
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": steps,
        "train_batch_size": train.micro_batch * steps * world,
        "gradient_clipping": optim.clip if train.zero_stage else 0.0,  # without ZeRO the backend clips, see `step`
        "zero_optimization": {"stage": train.zero_stage, "overlap_comm": False, "contiguous_gradients": True},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def disable_shared_memory_op() -> None:
    """Keep DeepSpeed on CPU from compiling its shared-memory collective at the first start.

    The build takes minutes and, killed half-way, leaves a lock that every later start waits on for ever; gloo alone
    costs a few milliseconds per step.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedBackend:
    """Backward, clip and step through a DeepSpeed engine. torch.distributed must be initialised."""

    def __init__(self, module: LossModule, train: TrainConfig, optim: OptimConfig, runtime: Runtime) -> None:
        disable_shared_memory_op()
        self._model = module.model
        self._stage = train.zero_stage
        self._clip = optim.clip
        self._summands = accumulation(train, runtime.world) * runtime.world
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module.model, optim, runtime.device),
            config=deepspeed_config(train, optim, runtime.world),
            dist_init_required=False,
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer whose `param_groups` hold the learning rates."""
        return self.engine.basic_optimizer

    def forward(self, *args: Any) -> Any:
        """The module's forward, seen by DeepSpeed."""
        return self.engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss`, summed over ranks and pad groups.

        DeepSpeed divides by the accumulation steps and averages over ranks; the factor undoes both, because the loss
        is already normalised by the whole step's boxes.
        """
        self.engine.backward(loss * self._summands)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the pad group; the update waits for `step`

    def step(self) -> StepOutcome:
        """Clip and update, unless the gradient is not finite: then nothing changes on any rank."""
        if self._stage == 0:
            # Without ZeRO DeepSpeed would apply a non-finite gradient too. Gradients are equal on all ranks here.
            norm = clip_gradients(self._model, self._clip)
            if not math.isfinite(norm):
                self.engine.zero_grad()
            self.engine.step()
            return StepOutcome(math.isfinite(norm), norm)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return StepOutcome(not self.engine.optimizer.overflow, norm)

    def optimizer_state(self) -> OptimizerState:
        """Moments of every trainable parameter by name, whole on every rank (collective: call it on all ranks)."""
        steps = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        if not steps:
            return OptimizerState(0, {})
        self._link_partitions()
        moments: dict[str, torch.Tensor] = {}
        for name, parameter in self._trainable():
            for key in MOMENTS:
                value = (
                    self.optimizer.state[parameter][key]
                    if self._stage == 0
                    else safe_get_full_optimizer_state(parameter, key)
                )
                moments[f"{key}/{name}"] = value.detach().to("cpu", copy=True)
        return OptimizerState(max(steps), moments)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Put `state` into this rank's partition. Raises CheckpointError if a parameter's moments are missing."""
        if state.step == 0:
            return
        for group in self.optimizer.param_groups:
            for owned in group["params"]:  # whole parameters, or with ZeRO this rank's flat partition of the group
                empty = {key: torch.zeros_like(owned) for key in MOMENTS}
                step = torch.tensor(float(state.step), device=owned.device if group["fused"] else "cpu")
                self.optimizer.state[owned] = {"step": step, **empty}
        self._link_partitions()
        for name, parameter in self._trainable():
            for key in MOMENTS:
                value = state.moments.get(f"{key}/{name}")
                if value is None:
                    raise CheckpointError(f"optimizer state lacks {key} of {name}: the checkpoint is of another model")
                if self._stage == 0:
                    self.optimizer.state[parameter][key].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _link_partitions(self) -> None:
        """Tell every parameter where its moments lie in the flat partitions.

        DeepSpeed links once, after its first group's first step, when the other groups have no state yet.
        """
        if self._stage == 0:
            return
        zero = self.engine.optimizer
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            if self.optimizer.state.get(flat):
                lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
