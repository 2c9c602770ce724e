"""The DeepSpeed backend: the config's ZeRO settings for DeepSpeed, and optimizer steps through its engine.

It is the only file that uses DeepSpeed and its private parts; it knows DeepSpeed 0.19. `backend.PlainBackend` does the
same without DeepSpeed. Optimizer state is saved and loaded by parameter name, so a checkpoint fits any world size and
stage. A checkpoint of another model is a CheckpointError.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.config import OptimConfig, TrainConfig
from pipeline.data.batch import Batch
from pipeline.engine.backend import MOMENTS, OptimizerState, StepOutcome, clip_gradients, clip_on_device, outcome_of
from pipeline.engine.batching import batch_arithmetic
from pipeline.engine.module import LossModule, StepNorm
from pipeline.engine.optim import build_optimizer
from pipeline.engine.precision import initial_scale
from pipeline.engine.stage import resolve_stage
from pipeline.errors import CheckpointError
from pipeline.runtime import Runtime

BUCKET_ELEMENTS = 25 * 2**20 // 4  # gradients (fp32, 25 MiB) that are reduced at a time during backward
KEEP_WHOLE = 10_000  # ZeRO 3 does not partition smaller parameters, because fetching them costs more than it saves


class ZeroOptimizer(Protocol):
    """The part of DeepSpeed 0.19's optimizer at ZeRO 1, 2 and 3 that is used here; the lists are private."""

    overflow: bool  # the last step was not applied: a gradient was not finite
    bit16_groups: Sequence[Sequence[nn.Parameter]]  # ZeRO 1 and 2: the parameters of each group
    single_partition_of_fp32_groups: Sequence[Tensor]  # ZeRO 1 and 2: this rank's flat share of each group
    fp32_partitioned_groups_flat: Sequence[Tensor]  # ZeRO 3: the same

    def override_loss_scale(self, loss_scale: float) -> None:
        """Multiply the next loss by this number, and divide its gradient by it."""


class ShardedParameter(Protocol):
    """A parameter at ZeRO 3."""

    ds_tensor: Tensor  # this rank's share of it


class DeepSpeedEngine(Protocol):
    """The part of a `deepspeed.DeepSpeedEngine` that is used here."""

    optimizer: ZeroOptimizer  # without ZeRO the torch optimizer
    enable_backward_allreduce: bool  # without ZeRO: whether gradients are summed over the ranks
    basic_optimizer: torch.optim.Optimizer  # the torch optimizer

    def __call__(self, batch: Batch, norm: StepNorm) -> dict[str, Tensor]:
        """The module's forward."""

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> object:
        """Accumulate a gradient; `scale_wrt_gas` would divide it by the number of passes."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the last pass was the step's last."""

    def step(self) -> None:
        """Count a pass; after the step's last one, update."""

    def zero_grad(self) -> None:
        """Drop the gradients."""

    def get_global_grad_norm(self) -> float | Tensor:
        """Of the last step's gradient, before clipping."""


def overlaps(world: int, device: torch.device) -> bool:
    """Whether gradients are reduced during backward, which only helps on GPUs: they compute and send at the same time.

    A single rank sends nothing, and DeepSpeed would wait for its second stream at every step.
    """
    return world > 1 and device.type == "cuda"


def deepspeed_config(
    train: TrainConfig, optim: OptimConfig, world: int, trainable: int, overlap: bool
) -> dict[str, Any]:
    """DeepSpeed's settings for `world` ranks and a model with `trainable` parameters to train.

    With `overlap` each bucket of gradients is reduced while backward fills the next one. DeepSpeed 0.19 does so from
    ZeRO 1 on; without ZeRO it reduces after backward. DeepSpeed's own bucket would take 2 GB at every backward.

    Precision is absent on purpose: parameters stay fp32, and `LossModule` autocasts inside its forward. So
    coordinates, boxes, matcher and losses stay fp32 with every backend.
    """
    steps = batch_arithmetic(train, world).passes
    zero: dict[str, Any] = {"stage": train.zero_stage, "overlap_comm": overlap, "contiguous_gradients": True}
    zero["reduce_bucket_size"] = min(BUCKET_ELEMENTS, trainable) if overlap else trainable
    if train.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = KEEP_WHOLE
        # True would replace torch's linear in the whole process by one that rounds twice in low precision.
        zero["memory_efficient_linear"] = False
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": train.pad_group,
        "gradient_accumulation_steps": steps,
        "train_batch_size": train.pad_group * steps * world,
        "gradient_clipping": optim.clip if train.zero_stage else 0.0,  # without ZeRO the backend clips, see `step`
        "gradient_allreduce_op": "mean" if train.zero_stage == 3 else "sum",  # ZeRO 3 only has the mean
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also runs on the CPU; DeepSpeed's must be compiled first
        "steps_per_print": None,
    }


def disable_shared_memory_op() -> None:
    """Keep DeepSpeed on CPU from compiling its shared-memory collective at the first start.

    The build takes minutes. If it is killed, it leaves a lock that every later start waits for endlessly. Gloo alone
    costs a few milliseconds per step.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedBackend:
    """Backward, clip and step through a DeepSpeed engine. torch.distributed must be initialised."""

    def __init__(self, module: LossModule, train: TrainConfig, optim: OptimConfig, runtime: Runtime) -> None:
        disable_shared_memory_op()
        self._model = module.model
        trainable = sum(parameter.numel() for _, parameter in self._trainable())
        self._stage = resolve_stage(train, trainable)
        train = train.model_copy(update={"zero_stage": self._stage})
        self._clip = optim.clip
        self._runtime = runtime
        self._divided = runtime.world if self._stage == 3 else 1  # DeepSpeed's divisor of the ranks' summed gradient
        self._scale = initial_scale(train.precision)
        # Under ZeRO-3 each rank holds only its shard of every parameter. This full-shape CPU copy receives the
        # gathered weights.
        self._full_template = copy.deepcopy(module.model).cpu() if self._stage == 3 else None
        self.engine: DeepSpeedEngine
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module.model, optim, runtime.device),
            config=deepspeed_config(train, optim, runtime.world, trainable, overlaps(runtime.world, runtime.device)),
            dist_init_required=False,
        )
        if self._stage == 0 and runtime.world == 1:  # it would copy all gradients into a bucket and back
            self.engine.enable_backward_allreduce = False

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer whose `param_groups` hold the learning rates."""
        return self.engine.basic_optimizer

    def forward(self, batch: Batch, norm: StepNorm) -> dict[str, Tensor]:
        """The module's forward, through DeepSpeed."""
        return self.engine(batch, norm)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss`, summed over ranks and pad groups.

        The loss is already normalised by the whole step's boxes. Where DeepSpeed averages over the ranks, its loss
        scale undoes that, because DeepSpeed divides the gradient by it. So backward computes with the same numbers at
        every world size, and low precision rounds and overflows in the same way.
        """
        if self._stage == 0:
            loss = loss * self._unscale
        else:  # DeepSpeed multiplies by its scale
            self.engine.optimizer.override_loss_scale(self._unscale)
            loss = loss * self._divided
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the pad group; the update waits for `step`

    @property
    def _unscale(self) -> float:
        """The divisor of the gradient after it was reduced over the ranks."""
        return (self._scale.scale if self._scale else 1.0) / self._divided

    def step(self) -> StepOutcome:
        """Clip and update, unless the gradient is not finite: then nothing changes on any rank."""
        scale = self._scale
        if self._stage == 0:
            # Without ZeRO DeepSpeed would apply a non-finite gradient too. Gradients are equal on all ranks here.
            norm = clip_gradients(self._model, self._clip, self._unscale)
            if not math.isfinite(norm):
                self.engine.zero_grad()
            self.engine.step()
            applied = math.isfinite(norm)
        else:
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm())
            applied = not self.engine.optimizer.overflow
        self._scale = scale and scale.after(applied)
        return outcome_of(applied, norm, scale)

    @property
    def divides(self) -> bool:
        """Whether ZeRO divides anything among the ranks; parameters are then views of DeepSpeed's buffers."""
        return self._stage > 0

    @property
    def updates_alone(self) -> bool:
        """Without ZeRO, with the fused AdamW, and not in fp16, whose loss scale the host chooses."""
        return self._stage == 0 and bool(self.optimizer.param_groups[0]["fused"]) and self._scale is None

    def step_alone(self) -> Tensor:
        """Clip and update on the device. Gradients are equal on all ranks here."""
        norm = clip_on_device(self._model, self.optimizer, self._clip)
        self.engine.step()
        return norm

    def whole_model(self) -> nn.Module:
        """The model with whole weights on this rank, to evaluate and to save (collective: call it on all ranks).

        It is the trained model itself. Under ZeRO 3 it is a copy, because ranks evaluate different numbers of batches
        and would otherwise wait for each other's weights.
        """
        if self._full_template is None:
            return self._model
        whole = copy.deepcopy(self._full_template).to(self._runtime.device)
        with deepspeed.zero.GatheredParameters([*self._model.parameters()]):
            whole.load_state_dict(self._model.state_dict())
        return whole

    def optimizer_state(self) -> OptimizerState:
        """Moments of every trainable parameter by name, whole, on rank 0's CPU (collective: call it on all ranks).

        Other ranks get none; they only contribute their partitions, one parameter at a time.
        """
        steps = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        if not steps:
            return OptimizerState(0, {}, self._scale)
        self._link_partitions()
        moments: dict[str, Tensor] = {}
        for name, parameter in self._trainable():
            for key in MOMENTS:
                value = self._moment(parameter, key)
                if self._runtime.is_main:
                    moments[f"{key}/{name}"] = value.detach().to("cpu", copy=self._stage == 0)
        return OptimizerState(max(steps), moments, self._scale)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Put `state` into this rank's partition. Raises CheckpointError if a parameter's moments are missing."""
        self._scale = self._scale and (state.loss_scale or self._scale)
        if state.step == 0:
            return
        fused = self.optimizer.defaults["fused"]
        for owned in self._owned_tensors():
            empty = {key: torch.zeros_like(owned) for key in MOMENTS}
            step = torch.tensor(float(state.step), device=owned.device if fused else "cpu")
            self.optimizer.state[owned] = {"step": step, **empty}
        self._link_partitions()
        for name, parameter in self._trainable():
            for key in MOMENTS:
                value = state.moments.get(f"{key}/{name}")
                if value is None:
                    raise CheckpointError(f"optimizer state lacks {key} of {name}: the checkpoint is of another model")
                self._set_moment(parameter, key, value.to(parameter.device))

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The optimizer's own tensor, or with ZeRO a new one that holds all partitions (a collective)."""
        if self._stage == 0:
            value: Tensor = self.optimizer.state[parameter][key]
        else:
            value = safe_get_full_optimizer_state(parameter, key)
        return value

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self._stage == 0:
            self.optimizer.state[parameter][key].copy_(value)
        elif self._stage == 3:
            # Every parameter is split into `world` parts, the last one padded. DeepSpeed's own setter of whole values
            # reads beyond their end.
            share, flat = cast(ShardedParameter, parameter).ds_tensor.numel(), value.flatten()
            padded = pad(flat, (0, share * self._runtime.world - flat.numel()))
            own = padded[share * self._runtime.rank :][:share]
            safe_set_local_optimizer_state(parameter, own, key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _owned_tensors(self) -> list[Tensor]:
        """The tensors that this rank updates: whole parameters, or with ZeRO its flat partition of each group."""
        if self._stage == 3:  # its parameter groups are empty between updates
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [owned for group in self.optimizer.param_groups for owned in group["params"]]

    def _link_partitions(self) -> None:
        """Link every parameter to its moments in the flat partitions.

        DeepSpeed does it once, after its first group's first step, when the other groups have no state yet.
        """
        if self._stage in (0, 3):
            return
        zero = self.engine.optimizer
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            if self.optimizer.state.get(flat):
                lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
