"""The checkpoint that a worker group starts from: the newest complete one, the same on every rank.

Ray returns the newest checkpoint it has registered, even if its files are damaged or gone. So rank 0 reads the
candidates, newest first, until the digests of one are right. It warns of the damaged ones and broadcasts its choice.
Raises CheckpointError if the run has checkpoints and none of them is complete.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import ray.train
import torch.distributed as dist
from ray.train import CheckpointConsistencyMode

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.logs import get_logger
from pipeline.runtime import Runtime

log = get_logger("restoring")
T = TypeVar("T")


def restore(runtime: Runtime) -> Checkpoint | None:
    """The state and tensors to continue from, or None if the run has no checkpoint. A collective."""
    candidates = _candidates()
    if not candidates:
        return None
    found: Checkpoint | None = None
    outcome: list[str | CheckpointError | None] = [None]
    if runtime.is_main:
        try:
            chosen, found = newest_complete(candidates, _load)
            outcome = [chosen.path]
        except CheckpointError as error:
            outcome = [error]
    if runtime.world > 1:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], CheckpointError):
        raise outcome[0]
    if found is None:  # verified again, because this node may read it through another mount than rank 0
        found = _load(next((each for each in candidates if each.path == outcome[0]), candidates[0]))
    return found


def newest_complete(candidates: Sequence[T], load: Callable[[T], Checkpoint]) -> tuple[T, Checkpoint]:
    """The first of `candidates` that `load` accepts, and its content; a warning names those before it.

    Raises:
        CheckpointError: `load` accepts none of them; the message holds its errors.
    """
    skipped: list[str] = []
    for candidate in candidates:
        try:
            loaded = load(candidate)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        for reason in skipped:
            log.warning("checkpoint skipped: %s; continuing from step %d", reason, loaded.state.global_step)
        return candidate, loaded
    raise CheckpointError(f"no checkpoint of this run is complete: {'; '.join(skipped)}; start a new run with name=")


def _candidates() -> list[ray.train.Checkpoint]:
    """Registered checkpoints: first the one that Ray would continue from, then the others, newest first."""
    latest = ray.train.get_checkpoint()
    if latest is None:
        return []
    known = ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
    known = sorted(known, key=lambda each: -each.metrics.get("global_step", -1))
    return [latest, *(each.checkpoint for each in known if each.checkpoint.path != latest.path)]


def _load(stored: ray.train.Checkpoint) -> Checkpoint:
    try:
        with stored.as_directory() as folder:
            return checkpoint.load(folder)
    except OSError as error:  # raised by stores; for a local folder that is gone `load` raises CheckpointError
        raise CheckpointError(f"cannot read {stored.path}: {error}") from error
