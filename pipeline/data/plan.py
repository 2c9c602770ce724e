"""The order of an epoch as pure functions: which samples form a pad group, which groups a step, which rank runs which.

The unit is the pad group: `micro_batch` samples padded together, because the padding is part of the arithmetic. A plan
depends on the data set's digest, the seed, the epoch and the grouping, never on the world size or the loader's workers,
so a run resumes at any world size. Used by `loader`; NumPy only. Too few samples for one step is a ConfigError.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

Group = tuple[int, ...]  # positions of samples in the index
Step = list[Group]  # the groups of one optimizer step
Tail = Literal["drop", "wrap"]


@dataclass(frozen=True)
class Assigned:
    """One pad group as a rank runs it. Weight 0.0: a repeat that keeps the ranks' number of passes equal."""

    group: int  # its number within the step (or the evaluation)
    samples: Group
    weight: float


def steps_per_epoch(samples: int, global_batch: int, tail: Tail) -> int:
    """Optimizer steps of an epoch. Raises ConfigError if there is none."""
    if samples == 0:
        raise ConfigError("data.train holds no samples; build its shards from a file with images")
    steps = samples // global_batch if tail == "drop" else -(-samples // global_batch)
    if steps == 0:
        raise ConfigError(
            f"data.train has {samples} samples, fewer than train.global_batch {global_batch}: an epoch has no step; "
            f"set train.global_batch to at most {samples}, or data.tail=wrap to repeat samples"
        )
    return steps


def train_plan(
    sizes: NDArray[np.int64],
    *,
    digest: str,
    seed: int,
    epoch: int,
    micro_batch: int,
    global_batch: int,
    window: int,
    tail: Tail,
) -> list[Step]:
    """The steps of one epoch.

    The samples are shuffled; within windows of about `window` samples those of similar size are put together; then the
    steps are shuffled. With `drop` the shuffled order's last incomplete step is left out (other samples in each epoch);
    with `wrap` it is filled from the order's start.

    Args:
        sizes: [S, 2] (height, width) in pixels after augmentation.
        digest: hexadecimal digest of the data set.
        seed: of the run.
        epoch: from 0.
        micro_batch: samples per group.
        global_batch: samples per step, a multiple of micro_batch.
        window: samples among which sizes are compared; rounded down to whole steps, at least one.
        tail: what becomes of the incomplete step.

    Raises:
        ConfigError: see `steps_per_epoch`.
    """
    steps = steps_per_epoch(len(sizes), global_batch, tail)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(digest[:32], 16), seed, epoch])))
    order = np.resize(rng.permutation(len(sizes)), steps * global_batch)
    span = max(1, window // global_batch) * global_batch
    windows = [order[start : start + span] for start in range(0, len(order), span)]
    arranged = np.concatenate([part[_by_size(sizes[part], micro_batch)] for part in windows])
    per_step = arranged.reshape(steps, global_batch // micro_batch, micro_batch)[rng.permutation(steps)]
    return [[tuple(group) for group in step] for step in per_step.tolist()]


def eval_plan(sizes: NDArray[np.int64], micro_batch: int) -> list[Group]:
    """Groups of similar size that hold every sample exactly once; the last may be smaller.

    Args:
        sizes: [S, 2] (height, width) in pixels as evaluated.
        micro_batch: samples per group.
    """
    order = _by_size(sizes, micro_batch).tolist()
    return [tuple(order[start : start + micro_batch]) for start in range(0, len(order), micro_batch)]


def assign(groups: list[Group], rank: int, world: int) -> list[Assigned]:
    """What `rank` runs of a step: group j on rank j mod world, and the same number of passes, ceil(G / world), on each.

    Where there is no group left, the rank repeats one with weight 0, so that collectives meet.
    """
    numbers = range(rank, -(-len(groups) // world) * world, world)
    return [
        Assigned(j, groups[j], 1.0) if j < len(groups) else Assigned(j % len(groups), groups[j % len(groups)], 0.0)
        for j in numbers
    ]


def _by_size(sizes: NDArray[np.int64], micro_batch: int) -> NDArray[np.int64]:
    """An order in which neighbours are alike in both sides: strips of similar height, each sorted by width.

    With about sqrt(groups) strips both sides vary little within a group; every other strip runs backwards, so that the
    seams between strips pair alike widths too. Ties keep the incoming order.
    """
    groups = -(-len(sizes) // micro_batch)
    strip = micro_batch * max(1, round(groups**0.5))
    by_height = np.argsort(sizes[:, 0], kind="stable")
    strips = [by_height[start : start + strip] for start in range(0, len(sizes), strip)]
    turns = [part[np.argsort((-1) ** turn * sizes[part, 1], kind="stable")] for turn, part in enumerate(strips)]
    return np.concatenate(turns)
