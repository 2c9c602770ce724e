"""One optimizer step over a list of pad groups; runs with DeepSpeed (`zero.py`) or plain PyTorch, with or without Ray.

The loss and gradient of a step are the same, to rounding, at every world size: the groups are given, dropout is seeded
by (seed, step, group), and losses are normalised over the whole step. Used by `worker.py`, tests, benchmarks.
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
    """What one optimizer step did. `losses` are the step's own values, equal on all ranks."""

    applied: bool
    grad_norm: float
    losses: dict[str, float]
    image_ids: list[int]  # of this rank's groups
    rescaled: bool = False  # see StepOutcome
    stop: bool = False  # a rank was asked to leave: all do, after this step
    forward_seconds: float = 0.0  # of this rank's forward passes: its own work, before it waits for other ranks


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
