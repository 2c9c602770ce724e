"""One optimizer step over a list of pad groups, with DeepSpeed (`zero.py`) or plain PyTorch, with or without Ray.

The loss and gradient of a step are the same, to rounding, at every world size. The groups do not depend on it, dropout
is seeded by (seed, step, group), and losses are normalised over the whole step. A step whose gradient is not finite
changes nothing, and its result says so.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.data.batch import Batch
from pipeline.engine.backend import Backend, StepOutcome, outcome_of
from pipeline.engine.module import LossModule, StepNorm
from pipeline.runtime import Runtime


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step. `losses` are those of the whole step, equal on all ranks."""

    applied: bool
    grad_norm: float
    losses: dict[str, float]
    image_ids: list[int]  # of this rank's groups
    rescaled: bool = False  # see StepOutcome
    stop: bool = False  # whether a rank was asked to stop; then all ranks stop after this step
    forward_seconds: float = 0.0  # of this rank's forward passes, before it waits for other ranks


@dataclass(frozen=True)
class PendingStep:
    """A step that the device may still be computing; `read` waits for it."""

    names: list[str]  # of the losses
    numbers: torch.Tensor  # losses, pad groups, ranks that were asked to stop; the gradient's norm if `outcome` is None
    copied: "torch.cuda.Event | None"  # when `numbers` has arrived
    outcome: StepOutcome | None  # None: the device alone decided whether to update
    weights: Mapping[str, float]  # of the losses in the total
    image_ids: list[int]
    forward_seconds: float

    def read(self) -> StepResult:
        """The result. Waits for the device unless it has long finished the step."""
        if self.copied is not None:
            self.copied.synchronize()
        numbers = self.numbers.tolist()
        outcome = self.outcome or outcome_of(math.isfinite(numbers[-1]), numbers.pop(), None)
        *values, count, stops = numbers
        losses = {
            name: value if name.startswith("loss_") else value / count
            for name, value in zip(self.names, values, strict=True)
        }
        total = sum(self.weights[name] * losses[name] for name in losses if name in self.weights)
        return StepResult(
            outcome.applied,
            outcome.grad_norm,
            {"loss": total, **losses},
            self.image_ids,
            outcome.rescaled,
            stop=stops > 0,
            forward_seconds=self.forward_seconds,
        )


class Engine:
    """Runs optimizer steps of one rank.

    Args:
        module: model and criterion.
        backend: makes the updates.
        runtime: this rank.
        seed: of the run.
        delay: `train.delay_results`; means nothing if the backend cannot update without the host.
    """

    def __init__(self, module: LossModule, backend: Backend, runtime: Runtime, seed: int, delay: bool = False) -> None:
        self.delays = delay and backend.updates_alone
        self.module = module
        self.backend = backend
        self._runtime = runtime
        self._seed = seed

    def train_step(self, batches: Sequence[Batch], step: int, stop: bool = False) -> StepResult:
        """Run one optimizer step and wait for its result; see `start_step`."""
        return self.start_step(batches, step, stop).read()

    def start_step(self, batches: Sequence[Batch], step: int, stop: bool = False) -> PendingStep:
        """Run one optimizer step. A collective.

        With `delays` the device has the whole step queued when this returns, and `read` is best called after the next
        step has been started. Else everything but the losses is known.

        Groups of weight 0 (the world size does not divide the groups) run for their collectives and add nothing.

        Args:
            batches: this rank's pad groups.
            step: of the whole run, from 0.
            stop: whether this rank was asked to stop.
        """
        self.module.train()
        norm = self._norm_of_step(batches, stop)
        names: list[str] = []
        sums: torch.Tensor | float = 0.0
        seconds = 0.0
        for batch in batches:
            torch.manual_seed(dropout_seed(self._seed, step, batch.group))
            start = time.perf_counter()
            losses = self.backend.forward(batch.to(self._runtime.device), norm)
            seconds += time.perf_counter() - start  # the matcher has waited for the device
            self.backend.backward(self.module.criterion.total(losses) * batch.weight)
            names = [*losses]
            sums = sums + torch.stack([value.detach().float() for value in losses.values()]) * batch.weight
        assert isinstance(sums, torch.Tensor)  # a step has groups
        norms = [self.backend.step_alone()[None]] if self.delays else []
        outcome = None if self.delays else self.backend.step()
        if self._runtime.world > 1:
            dist.all_reduce(sums)
        # The norm is equal on all ranks. Values that are not losses (class_error, ...) become means over groups.
        packed = torch.cat([sums, norm.groups[None], norm.stops[None], *norms])
        numbers, copied = (packed, None) if not self.delays else _copy_to_host(packed)
        return PendingStep(
            names,
            numbers,
            copied,
            outcome,
            self.module.criterion.weight_dict,
            [int(i) for batch in batches for i in batch.image_ids],
            seconds,
        )

    def inspect(
        self, batches: Sequence[Batch], step: int, summary: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Repeat the forward pass of a step that was not applied; returns a description of each pad group's outputs.

        A collective: all ranks must call it, with the arguments that they gave to `train_step`.
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
        # Created on the host and copied asynchronously: with torch.tensor(..., device=) the host waits for the GPU.
        totals = torch.tensor([boxes, groups, float(stop)]).to(self._runtime.device, non_blocking=True)
        if self._runtime.world > 1:
            dist.all_reduce(totals)
        return StepNorm(totals[0].clamp(min=1), totals[1], totals[2])


def _copy_to_host(numbers: torch.Tensor) -> "tuple[torch.Tensor, torch.cuda.Event | None]":
    """Start a copy into pinned memory; also returns the event of its end, None on a CPU."""
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
    host.copy_(numbers, non_blocking=True)
    if not numbers.is_cuda:
        return host, None
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives it no types
    copied.record(torch.cuda.current_stream(numbers.device))
    return host, copied


def dropout_seed(seed: int, step: int, group: int) -> int:
    """The seed of one pad group in one step; it does not depend on the rank."""
    return int(np.random.SeedSequence([seed, step, group]).generate_state(1, np.uint64)[0] >> 1)
