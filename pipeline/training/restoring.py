"""The checkpoint that a worker group starts from: the newest one that proves complete, the same on every rank.

Ray hands out the newest checkpoint it has registered, whatever has become of its files. Rank 0 reads candidates from
the newest on until one has the right digests, says which ones it passed over, and tells the others which one it is.
Used by `worker.py`. Raises CheckpointError if there are checkpoints and none of them is complete.
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
    """The state and tensors to go on from, or None if the run has no checkpoint. A collective."""
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
    if found is None:  # rank 0 has proved it, but another node may read it through another mount
        found = _load(next((each for each in candidates if each.path == outcome[0]), candidates[0]))
    return found


def newest_complete(candidates: Sequence[T], load: Callable[[T], Checkpoint]) -> tuple[T, Checkpoint]:
    """The first of `candidates` that `load` takes, and what it holds; a warning names those before it.

    Raises:
        CheckpointError: `load` takes none of them; the message holds what it said.
    """
    skipped: list[str] = []
    for candidate in candidates:
        try:
            loaded = load(candidate)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        for reason in skipped:
            log.warning("checkpoint skipped: %s; going on from step %d", reason, loaded.state.global_step)
        return candidate, loaded
    raise CheckpointError(f"no checkpoint of this run is complete: {'; '.join(skipped)}; start with a new name=")


def _candidates() -> list[ray.train.Checkpoint]:
    """Registered checkpoints, the one that Ray would go on from first, then by step from the newest on."""
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
    except OSError as error:  # of a store; a local folder that is gone has no state, which `load` says
        raise CheckpointError(f"cannot read {stored.path}: {error}") from error
