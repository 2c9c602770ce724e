"""The guard against NaN and infinity: it counts skipped steps, describes each, and ends the run after N in a row.

When `check` is called, the backend has already skipped the update on all ranks. The weights are therefore still those
of the bad step, and dropout is seeded by step and group. So the guard runs the step again to describe it, and healthy
steps cost nothing. With `train.delay_results` the next step has been applied before: then losses and images are those
of the bad step, but outputs and weights those after the next one. Raises NonFiniteError after `train.nonfinite_limit`
steps in a row.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.engine.step import Engine, StepResult
from pipeline.errors import NonFiniteError
from pipeline.logs import get_logger
from pipeline.runtime import Runtime

log = get_logger("nonfinite")


class NonFiniteGuard:
    """Counts the steps in a row whose loss or gradient was not finite.

    Args:
        engine: what ran the step.
        runtime: this rank.
        limit: `train.nonfinite_limit`.
        save: stores the dump, given its text and file name. All ranks call it; `RunLogger.text` keeps rank 0's.
    """

    def __init__(self, engine: Engine, runtime: Runtime, limit: int, save: Callable[[str, str], None]) -> None:
        self._engine = engine
        self._runtime = runtime
        self._limit = limit
        self._save = save
        self._in_a_row = 0

    def check(self, result: StepResult, batches: Sequence[Batch], step: int) -> None:
        """Check the step that has just run. A collective after a bad step, which all ranks describe together.

        A step that was skipped only because fp16's loss scale was too large is not bad.

        Raises:
            NonFiniteError: it was the last of too many bad steps in a row.
        """
        if result.applied or result.rescaled:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        ranks = self._gather({"rank": self._runtime.rank, "groups": self._engine.inspect(batches, step, summary)})
        images = [i for rank in ranks for group in rank["groups"] for i in group["image_ids"] if group["weight"]]
        log.warning("step %d skipped: loss or gradient is not finite; images %s", step, images)
        dump = {
            "step": step,
            "image_ids": images,
            "losses": {name: _number(value) for name, value in result.losses.items()},
            "ranks": ranks,
            "parameters": summary(dict(self._engine.module.model.named_parameters())),
        }
        self._save(json.dumps(dump, indent=1), f"nonfinite/step_{step}.json")
        if self._in_a_row >= self._limit:
            raise NonFiniteError(
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient, the last at step {step} on images "
                f"{images[:20]}; nonfinite/step_{step}.json of the run names the part of the loss and the weights. "
                "Lower optim.lr, use train.precision=fp32, or check these images with jobs.shard"
            )

    def _gather(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        ranks = [own] * self._runtime.world
        if self._runtime.world > 1:
            dist.all_gather_object(ranks, own)
        return ranks


def summary(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Largest magnitude and Euclidean norm of every tensor in nested mappings and sequences, by dotted path.

    NaN and infinity become strings, because JSON has no numbers for them.
    """
    tensors = dict(_tensors("", tree))
    if not tensors:
        return {}
    with torch.no_grad():
        values = [t.detach().float().flatten() for t in tensors.values()]
        packed = torch.stack([torch.stack([v.abs().max(), v.norm()]) if len(v) else v.new_zeros(2) for v in values])
    rows = packed.tolist()  # waits for the device once
    return {name: {"max": _number(row[0]), "norm": _number(row[1])} for name, row in zip(tensors, rows, strict=True)}


def _tensors(path: str, tree: Any) -> list[tuple[str, Tensor]]:
    if isinstance(tree, Tensor | nn.Parameter):
        return [(path, tree)]
    if isinstance(tree, Mapping):
        items: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
    else:
        return []
    return [found for key, value in items for found in _tensors(f"{path}.{key}" if path else str(key), value)]


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
