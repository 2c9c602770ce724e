"""The order of an epoch as pure functions: which samples form a pad group, which groups a step, which rank runs which.

The unit is the pad group: `micro_batch` samples padded together, because the padding is part of the arithmetic. A plan
depends on the data set's digest, the seed, the epoch and the grouping. It never depends on the world size or the
loader's workers, so a run can be resumed at any world size. Of NumPy's generators only the raw bits are used, because
they are the same in all versions. Too few samples for one step is a ConfigError.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

Ints = NDArray[np.int64]
Group = tuple[int, ...]  # positions of samples in the index
Tail = Literal["drop", "wrap"]


@dataclass(frozen=True)
class Turn:
    """One pad group of a step on a rank. Weight 0.0 marks a repeat, so that all ranks run the same number of groups."""

    group: int  # its number within the step
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
    sizes: Ints,
    shards: NDArray[np.integer],
    *,
    digest: str,
    seed: int,
    epoch: int,
    micro_batch: int,
    global_batch: int,
    mix_shards: int,
    window: int,
    tail: Tail,
) -> Ints:
    """The samples of one epoch, [steps, groups, micro_batch].

    Shards are shuffled and split into blocks of at most `mix_shards`; the samples of a block are shuffled. Windows of
    about `window` samples are then sorted by size, so that groups have similar sizes. Groups of similar area become a
    step, so that its ranks have equal work; the window's steps are shuffled. `drop` omits the last incomplete step,
    with other samples in each epoch; `wrap` fills it from the start of the order.

    Args:
        sizes: [S, 2] (height, width) in pixels after augmentation.
        shards: [S] number of the shard that holds each sample.
        digest: hexadecimal digest of the data set.
        seed: of the run.
        epoch: from 0.
        micro_batch: samples per group.
        global_batch: samples per step, a multiple of micro_batch.
        mix_shards: shards per block; see also `max_open_shards`.
        window: samples among which sizes are compared; rounded down to whole steps, at least one.
        tail: whether the incomplete step is dropped or filled.

    Raises:
        ConfigError: see `steps_per_epoch`.
    """
    steps = steps_per_epoch(len(sizes), global_batch, tail)
    count = int(shards.max()) + 1
    entropy = np.random.SeedSequence([int(digest[:32], 16), seed, epoch])
    keys = np.split(np.random.Philox(entropy).random_raw(count + len(sizes) + steps), [count, count + len(sizes)])
    position = np.empty(count, np.int64)
    position[np.argsort(keys[0], kind="stable")] = np.arange(count)
    order = np.resize(np.lexsort((keys[1], _blocks(position, mix_shards)[shards])), steps * global_batch)
    per_window = max(1, window // global_batch)
    order = order[_by_size(sizes[order], np.arange(len(order)) // (per_window * global_batch), micro_batch)]
    groups = order.reshape(-1, micro_batch)
    area = sizes[groups].max(axis=1).prod(axis=1)
    per_step = global_batch // micro_batch
    groups = groups[np.lexsort((area, np.arange(len(groups)) // (per_window * per_step)))]
    return groups.reshape(steps, per_step, micro_batch)[np.lexsort((keys[2], np.arange(steps) // per_window))]


def eval_plan(
    sizes: Ints, shards: NDArray[np.integer], micro_batch: int, mix_shards: int, max_images: int | None = None
) -> list[Group]:
    """Groups of similar size that hold every sample exactly once; the last may be smaller.

    Args:
        sizes: [S, 2] (height, width) in pixels as evaluated.
        shards: [S] number of the shard that holds each sample.
        micro_batch: samples per group.
        mix_shards: shards among whose samples sizes are compared.
        max_images: see `evaluated_samples`.
    """
    if len(sizes) == 0:
        return []
    blocks = _blocks(np.arange(int(shards.max()) + 1), mix_shards)[shards]
    kept = evaluated_samples(len(sizes), max_images)
    order = kept[np.argsort(blocks[kept], kind="stable")]
    order = order[_by_size(sizes[order], blocks[order], micro_batch)]
    return [tuple(order[start : start + micro_batch].tolist()) for start in range(0, len(order), micro_batch)]


def evaluated_samples(samples: int, max_images: int | None) -> Ints:
    """The samples that an evaluation sees: all, or `max_images` in equal distances if there are more."""
    if max_images is None or max_images >= samples:
        return np.arange(samples)
    return np.arange(max_images) * samples // max_images


def assign_groups(groups: int, rank: int, world: int) -> list[Turn]:
    """Assign a step's groups: group j runs on rank j mod world, and every rank runs the same number of groups.

    A rank without a group left repeats one with weight 0, so that collectives match.
    """
    numbers = range(rank, -(-groups // world) * world, world)
    return [Turn(j, 1.0) if j < groups else Turn(j % groups, 0.0) for j in numbers]


def max_open_shards(samples: int, shards: int, mix_shards: int, span: int) -> int:
    """The maximum number of shards that are read at the same time, if a window covers `span` samples (evaluation: 1).

    A window lies in one block of shards or covers parts of several; shards are assumed to have equal sizes.
    """
    per_block = max(1, samples // max(1, -(-shards // mix_shards)))
    return min(shards, mix_shards * (1 + -(-span // per_block)))


def shard_uses(steps: Ints, shards: NDArray[np.integer]) -> list[tuple[int, int, int]]:
    """(first step, last step, shard) of each shard that is read, in the order of their first use.

    Args:
        steps: [n] step of each sample that is read, ascending.
        shards: [n] its shard.
    """
    used, first = np.unique(shards, return_index=True)
    last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
    order = np.argsort(first, kind="stable")
    return list(zip(steps[first[order]].tolist(), steps[last[order]].tolist(), used[order].tolist(), strict=True))


def max_overlap(read: list[tuple[int, int, int]]) -> int:
    """The largest number of `shard_uses` that overlap in one step."""
    begins, ends = (np.sort(np.array([use[k] for use in read])) for k in (0, 1))
    return int((np.arange(1, len(begins) + 1) - np.searchsorted(ends, begins)).max())


def _blocks(position: Ints, mix_shards: int) -> Ints:
    """The block number of each shard, given its position in the order; block sizes differ by at most one."""
    return position * -(-len(position) // mix_shards) // len(position)


def _by_size(sizes: Ints, windows: Ints, micro_batch: int) -> Ints:
    """Sort samples within each window so that neighbours have similar sizes: strips of similar height, by width.

    With about sqrt(groups) strips both sides vary little within a group. Every other strip is in reverse order, so that
    widths are also similar where two strips meet. Ties keep their order. `windows` [S] ascends from 0.
    """
    counts = np.bincount(windows)
    strip = micro_batch * np.maximum(1, np.rint(np.sqrt(-(-counts // micro_batch)))).astype(np.int64)
    by_height = np.lexsort((sizes[:, 0], windows))
    within = np.arange(len(sizes)) - np.repeat(np.cumsum(counts) - counts, counts)
    number = within // strip[windows]
    width = np.where(number % 2, -1, 1) * sizes[by_height, 1]
    return by_height[np.lexsort((width, number, windows))]
