"""Invariants of the order contract, over worlds, workers, seeds, epochs, tails and resume points."""

import itertools
import time
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.config import AugmentConfig
from pipeline.data.plan import (
    Turn,
    assign_groups,
    eval_plan,
    max_open_shards,
    max_overlap,
    shard_uses,
    steps_per_epoch,
    train_plan,
)
from pipeline.data.transforms import draw_views
from pipeline.errors import ConfigError

DIGEST = "54770f5a9af1b6a28c96985b89b8bc3e4f619ac8df387bab50f6d5e14f6d52da"
Ints = NDArray[np.int64]


def some_sizes(samples: int, seed: int = 0) -> Ints:
    return np.random.default_rng(seed).integers(400, 1333, (samples, 2))


def some_shards(samples: int, shards: int) -> Ints:
    return np.arange(samples) * shards // samples


def plan(samples: int, shards: int = 3, **change: Any) -> Ints:
    options = {"digest": DIGEST, "seed": 1, "epoch": 0, "micro_batch": 2, "global_batch": 8, "window": 32}
    options |= {"mix_shards": 2, "tail": "drop", **change}
    return train_plan(some_sizes(samples), some_shards(samples, min(shards, samples)), **options)


@settings(deadline=None)  # a busy machine is no fault
@given(
    samples=st.integers(1, 200),
    shards=st.integers(1, 12),
    mix=st.integers(1, 12),
    micro=st.integers(1, 4),
    groups=st.integers(1, 5),
    window=st.integers(1, 100),
    tail=st.sampled_from(["drop", "wrap"]),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_train_plan_every_sample_once_in_full_steps(
    samples: int, shards: int, mix: int, micro: int, groups: int, window: int, tail: Any, seed: int, epoch: int
) -> None:
    batch = micro * groups
    options = {"micro_batch": micro, "global_batch": batch, "window": window, "tail": tail, "mix_shards": mix}
    if tail == "drop" and samples < batch:
        with pytest.raises(ConfigError, match=r"train\.global_batch .*data\.tail=wrap"):
            plan(samples, shards, **options)
        return
    steps = plan(samples, shards, seed=seed, epoch=epoch, **options)
    assert steps.shape == (steps_per_epoch(samples, batch, tail), groups, micro)
    counts = Counter(steps.ravel().tolist())
    assert set(counts) <= set(range(samples))
    if tail == "drop":
        assert max(counts.values()) == 1
        assert len(counts) == samples // batch * batch
    else:
        assert len(counts) == samples, "every sample at least once"
        assert max(counts.values()) - min(counts.values()) <= 1
        assert sum(counts.values()) < samples + batch


def loaded(steps: Ints, world: int, workers: int, start: int, stop: int | None = None) -> list[list[list[int]]]:
    """What comes out of `world` loaders from `start` until they are killed before `stop`: per step its samples.

    As the loaders do it: each rank asks for its turns in order, request n goes to worker n mod workers, and the batches
    are taken from the workers in turn.
    """
    done: list[list[list[int]]] = [[] for _ in range(start, len(steps) if stop is None else stop)]
    for rank in range(world):
        turns = assign_groups(steps.shape[1], rank, world)
        requests = [(t, turn) for t in range(start, start + len(done)) for turn in turns]
        queues = [requests[worker :: max(1, workers)] for worker in range(max(1, workers))]
        taken = [queues[n % len(queues)][n // len(queues)] for n in range(len(requests))]
        for t, turn in taken:
            if turn.weight:
                done[t - start].append([turn.group, *steps[t, turn.group].tolist()])
    return [sorted(step) for step in done]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), world=st.integers(1, 64), workers=st.integers(0, 8), epoch=st.integers(0, 5))
def test_train_plan_resumed_in_another_world_is_the_same(
    data: st.DataObject, world: int, workers: int, epoch: int
) -> None:
    groups = data.draw(st.integers(1, 70), label="groups per step")
    steps = plan(groups * 2 * 5 + 1, 7, seed=world, epoch=epoch, global_batch=groups * 2, window=groups * 4)
    whole = loaded(steps, 1, 0, 0)
    assert [[sample for group in step for sample in group[1:]] for step in whole] == steps.reshape(5, -1).tolist()
    stops = sorted(data.draw(st.lists(st.integers(0, 5), max_size=3), label="killed before step"))
    parts, at = [], 0
    for stop in [*stops, 5]:
        parts += loaded(steps, world, workers, at, stop)
        at = stop
        world, workers = data.draw(st.integers(1, 64), label="world"), data.draw(st.integers(0, 8), label="workers")
    assert parts == whole, "each step's groups exactly once, in their places"


def test_train_plan_depends_on_epoch_seed_and_data() -> None:
    assert np.array_equal(plan(64), plan(64))
    others = [plan(64, epoch=1), plan(64, seed=2), plan(64, digest="0" * 64)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations([plan(64), *others], 2))


def test_train_plan_order_is_fixed_across_versions() -> None:
    """A run that is resumed after an upgrade must see the same order; a change here belongs in the CHANGELOG."""
    found = plan(12, 3, micro_batch=1, global_batch=4, window=8).ravel().tolist()
    assert found == [6, 0, 5, 7, 3, 2, 1, 4, 11, 10, 8, 9]


def test_train_plan_drop_omits_other_samples_each_epoch() -> None:
    missing = [set(range(63)) - set(plan(63, epoch=epoch).ravel().tolist()) for epoch in range(4)]
    assert all(len(left) == 7 for left in missing)
    assert len(set().union(*missing)) > 15


@pytest.mark.parametrize("world", [*range(1, 12), 64])
def test_assign_groups_shares_step_evenly(world: int) -> None:
    for groups in (1, 5, 8, 63):
        shares = [assign_groups(groups, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {-(-groups // world)}, "collectives meet"
        weighted = [turn for share in shares for turn in share if turn.weight]
        assert sorted(turn.group for turn in weighted) == list(range(groups)), "each group once"
        for rank, share in enumerate(shares):
            assert all(turn.weight in (0.0, 1.0) and turn.group < groups for turn in share)
            assert all(turn.group % world == rank for turn in share if turn.weight)


def test_assign_groups_missing_group_repeats_with_weight_zero() -> None:
    assert assign_groups(2, 3, 4) == [Turn(1, 0.0)]
    assert assign_groups(3, 1, 2) == [Turn(1, 1.0), Turn(0, 0.0)]


@pytest.mark.parametrize(("samples", "micro", "mix"), [(1, 4, 1), (7, 2, 2), (80, 3, 16), (64, 1, 1)])
def test_eval_plan_every_sample_once(samples: int, micro: int, mix: int) -> None:
    shards = some_shards(samples, min(5, samples))
    groups = eval_plan(some_sizes(samples), shards, micro, mix)
    assert sorted(i for group in groups for i in group) == list(range(samples))
    assert [len(group) for group in groups[:-1]] == [micro] * (len(groups) - 1)
    assert groups == eval_plan(some_sizes(samples), shards, micro, mix)
    open_at_once = [len(np.unique(shards[list(group)])) for group in groups]
    assert max(open_at_once) <= 2 * mix


@pytest.mark.parametrize("kept", [1, 3, 7, 16, 17, 40])
def test_eval_plan_max_images_are_spread_over_the_samples(kept: int) -> None:
    shards = np.arange(17) // 5
    groups = eval_plan(some_sizes(17), shards, 2, 1, kept)
    rows = sorted(row for group in groups for row in group)
    assert len(rows) == len(set(rows)) == min(kept, 17)
    assert rows[0] == 0
    assert max(np.diff([*rows, 17])) <= -(-17 // kept)
    if kept >= 17:
        assert groups == eval_plan(some_sizes(17), shards, 2, 1)


def test_eval_plan_without_samples_is_empty() -> None:
    assert eval_plan(np.zeros((0, 2), np.int64), np.zeros(0, np.int64), 2, 4) == []


def padding(groups: Ints, sizes: Ints) -> float:
    shown = sizes[groups]
    return float(1 - shown.prod(-1).sum() / (groups.shape[-1] * shown.max(-2).prod(-1).sum()))


def test_train_plan_groups_have_similar_sizes() -> None:
    grouped = plan(1024, micro_batch=4, global_batch=16, window=256)
    order = np.random.default_rng(0).permutation(1024).reshape(-1, 4)
    assert padding(grouped, some_sizes(1024)) < 0.4 * padding(order, some_sizes(1024))


def test_train_plan_groups_of_a_step_have_similar_area() -> None:
    grouped = plan(4096, micro_batch=2, global_batch=32, window=256)
    area = some_sizes(4096)[grouped].max(axis=2).prod(axis=2)
    assert (area.mean(axis=1) / area.max(axis=1)).mean() > 0.85, "the slowest rank sets the step"


def test_train_plan_window_bounds_rearrangement() -> None:
    """With a window of one step, the samples of a step are those of the plain shuffle, whatever their sizes."""
    arranged = [set(step.ravel().tolist()) for step in plan(64, window=1)]
    options: dict[str, Any] = {"digest": DIGEST, "seed": 1, "epoch": 0, "micro_batch": 2, "global_batch": 8}
    even = np.ones((64, 2), np.int64)
    same = train_plan(even, some_shards(64, 3), **options, mix_shards=2, window=1, tail="drop")
    assert arranged == [set(step.ravel().tolist()) for step in same]
    wide = plan(640, window=640)
    heights = some_sizes(640)[wide, 0].mean(axis=(1, 2))
    assert abs(np.corrcoef(heights, range(len(heights)))[0, 1]) < 0.4, "sorted windows are not visible in the steps"


@settings(deadline=None, max_examples=40)
@given(shards=st.integers(1, 40), mix=st.integers(1, 10), window=st.integers(1, 60), epoch=st.integers(0, 3))
def test_max_open_shards_bounds_shards_of_a_plan(shards: int, mix: int, window: int, epoch: int) -> None:
    """At any time within few blocks; each shard is opened once and left once, not visited all over the epoch."""
    samples = shards * 20
    where = some_shards(samples, shards)
    steps = plan(samples, shards, mix_shards=mix, window=window, epoch=epoch, global_batch=8)
    used = where[steps.reshape(len(steps), -1)]
    first = {shard: int(np.flatnonzero((used == shard).any(axis=1))[0]) for shard in np.unique(used).tolist()}
    last = {shard: int(np.flatnonzero((used == shard).any(axis=1))[-1]) for shard in first}
    open_at = [sum(first[shard] <= t <= last[shard] for shard in first) for t in range(len(steps))]
    assert max(open_at) <= max_open_shards(samples, shards, mix, max(8, window)) <= shards
    read = shard_uses(np.repeat(np.arange(len(steps)), used.shape[1]), used.ravel())
    assert {shard: (a, b) for a, b, shard in read} == {shard: (first[shard], last[shard]) for shard in first}
    assert [begin for begin, _, _ in read] == sorted(first.values())
    assert max_overlap(read) == max(open_at)


def test_train_plan_one_block_is_one_shuffle() -> None:
    """With as many shards mixed as there are, neighbours in the order come from any two shards."""
    order = plan(3000, 10, mix_shards=10, window=1, micro_batch=1, global_batch=1).ravel()
    pairs = Counter(itertools.pairwise(some_shards(3000, 10)[order].tolist()))
    assert len(pairs) == 100
    assert max(pairs.values()) < 3 * 30


def test_train_plan_of_coco_is_fast_and_small() -> None:
    """118,287 images in 189 shards; `python -m benchmarks.plan` prints the figures, these are limits on any machine."""
    rng = np.random.default_rng(0)
    sizes, shards = rng.integers(300, 641, (118_287, 2)), some_shards(118_287, 189)
    tracemalloc.start()
    start = time.process_time()
    views = draw_views(sizes, 0, 3, AugmentConfig())
    options: dict[str, Any] = {"digest": DIGEST, "seed": 0, "epoch": 3, "mix_shards": 16, "window": 256, "tail": "drop"}
    steps = train_plan(views.out_size, shards, micro_batch=2, global_batch=8192, **options)
    turns = [assign_groups(4096, rank, 4096) for rank in (0, 4095)]
    spent, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert steps.shape == (14, 4096, 2)
    assert turns == [[Turn(0, 1.0)], [Turn(4095, 1.0)]]
    assert spent < 5, "per sample in Python it was 3 seconds on a fast machine"
    assert peak < 100 * 2**20


def test_train_plan_without_samples_raises() -> None:
    with pytest.raises(ConfigError, match=r"data\.train holds no samples"):
        steps_per_epoch(0, 4, "wrap")
