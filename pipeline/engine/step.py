"""One optimizer step over a list of pad groups, with DeepSpeed (`zero.py`) or plain PyTorch, with or without Ray.

The loss and gradient of a step are the same, to rounding, at every world size. The groups do not depend on it, dropout
is seeded by (seed, step, group), and losses are normalised over the whole step. A step whose gradient is not finite
changes nothing, and its result says so.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.data.batch import Batch
from pipeline.engine.backend import Backend
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


class Engine:
    """Runs optimizer steps of one rank."""

    def __init__(self, module: LossModule, backend: Backend, runtime: Runtime, seed: int) -> None:
        self.module = module
        self.backend = backend
        self._runtime = runtime
        self._seed = seed

    def train_step(self, batches: Sequence[Batch], step: int, stop: bool = False) -> StepResult:
        """Run one optimizer step. A collective.

        Groups of weight 0 (the world size does not divide the groups) run for their collectives and add nothing.

        Args:
            batches: this rank's pad groups.
            step: of the whole run, from 0.
            stop: whether this rank was asked to stop.
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
        totals, stops = self._reduce(sums, norm)
        return StepResult(
            outcome.applied,
            outcome.grad_norm,
            totals,
            [int(i) for batch in batches for i in batch.image_ids],
            outcome.rescaled,
            stop=stops > 0,
            forward_seconds=seconds,
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
        totals = torch.tensor([boxes, groups, float(stop)], device=self._runtime.device)
        if self._runtime.world > 1:
            dist.all_reduce(totals)
        return StepNorm(totals[0].clamp(min=1), totals[1], totals[2])

    def _reduce(self, sums: dict[str, torch.Tensor], norm: StepNorm) -> tuple[dict[str, float], float]:
        """Sum the ranks' losses; values that are not losses (class_error, ...) become means over groups.

        The second value is the number of ranks that were asked to stop.
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
    """The seed of one pad group in one step; it does not depend on the rank."""
    return int(np.random.SeedSequence([seed, step, group]).generate_state(1, np.uint64)[0] >> 1)
