"""Invariants of the order contract, over worlds, seeds, epochs, tails and resume points."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.plan import Assigned, assign, eval_plan, steps_per_epoch, train_plan
from pipeline.errors import ConfigError

DIGEST = "54770f5a9af1b6a28c96985b89b8bc3e4f619ac8df387bab50f6d5e14f6d52da"


def some_sizes(samples: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(400, 1333, (samples, 2))


def plan(samples: int, **change: Any) -> list[list[tuple[int, ...]]]:
    options = {"digest": DIGEST, "seed": 1, "epoch": 0, "micro_batch": 2, "global_batch": 8, "window": 32}
    return train_plan(some_sizes(samples), **{**options, "tail": "drop", **change})


def flat(steps: list[list[tuple[int, ...]]]) -> list[int]:
    return [sample for step in steps for group in step for sample in group]


@settings(deadline=None)  # a busy machine is no fault
@given(
    samples=st.integers(1, 200),
    micro=st.integers(1, 4),
    groups=st.integers(1, 5),
    window=st.integers(1, 100),
    tail=st.sampled_from(["drop", "wrap"]),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_and_full_steps(
    samples: int, micro: int, groups: int, window: int, tail: Any, seed: int, epoch: int
) -> None:
    batch = micro * groups
    options = {"micro_batch": micro, "global_batch": batch, "window": window, "tail": tail}
    if tail == "drop" and samples < batch:
        with pytest.raises(ConfigError, match=r"train\.global_batch .*data\.tail=wrap"):
            plan(samples, **options)
        return
    steps = plan(samples, seed=seed, epoch=epoch, **options)
    assert len(steps) == steps_per_epoch(samples, batch, tail)
    assert all(len(step) == groups and all(len(group) == micro for group in step) for step in steps)
    counts = Counter(flat(steps))
    assert set(counts) <= set(range(samples))
    if tail == "drop":
        assert max(counts.values()) == 1
        assert len(counts) == samples // batch * batch
    else:
        assert len(counts) == samples, "every sample at least once"
        assert max(counts.values()) - min(counts.values()) <= 1
        assert sum(counts.values()) < samples + batch


def test_pure_and_different_per_epoch_seed_and_data() -> None:
    assert plan(64) == plan(64)
    others = [plan(64, epoch=1), plan(64, seed=2), plan(64, digest="0" * 64)]
    assert all(a != b for a, b in itertools.combinations([plan(64), *others], 2))


def test_drop_leaves_out_other_samples_in_each_epoch() -> None:
    missing = [set(range(63)) - set(flat(plan(63, epoch=epoch))) for epoch in range(4)]
    assert all(len(left) == 7 for left in missing)
    assert len(set().union(*missing)) > 15


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("start", [0, 1, 5])
def test_any_world_runs_the_same_steps_from_any_resume_point(world: int, start: int) -> None:
    steps = plan(63, global_batch=10)[start:]
    for step in steps:
        shares = [assign(step, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {-(-len(step) // world)}, "collectives meet"
        weighted = [item for share in shares for item in share if item.weight]
        assert sorted(item.group for item in weighted) == list(range(len(step))), "each group once"
        for rank, share in enumerate(shares):
            for item in share:
                assert item.samples == step[item.group]
                assert item.weight in (0.0, 1.0)
                assert item.weight == 0 or item.group % world == rank


def test_missing_groups_repeat_one_with_weight_zero() -> None:
    assert assign([(1, 2), (3, 4)], 3, 4) == [Assigned(1, (3, 4), 0.0)]
    assert assign([(1, 2), (3, 4), (5, 6)], 1, 2) == [Assigned(1, (3, 4), 1.0), Assigned(0, (1, 2), 0.0)]


@pytest.mark.parametrize(("samples", "micro"), [(1, 4), (7, 2), (80, 3), (64, 1)])
def test_evaluation_sees_every_sample_once(samples: int, micro: int) -> None:
    groups = eval_plan(some_sizes(samples), micro)
    assert sorted(i for group in groups for i in group) == list(range(samples))
    assert [len(group) for group in groups[:-1]] == [micro] * (len(groups) - 1)
    assert groups == eval_plan(some_sizes(samples), micro)


def padding(groups: list[tuple[int, ...]], sizes: NDArray[np.int64]) -> float:
    area = sum(sizes[list(group)].prod(axis=1).sum() for group in groups)
    padded = sum(len(group) * sizes[list(group)].max(axis=0).prod() for group in groups)
    return float(1 - area / padded)


def test_similar_sizes_share_a_group() -> None:
    sizes = some_sizes(1024)
    steps = plan(1024, micro_batch=4, global_batch=16, window=256)
    grouped = padding([group for step in steps for group in step], some_sizes(1024))
    order = np.random.default_rng(0).permutation(1024).reshape(-1, 4)
    assert grouped < 0.4 * padding([tuple(group) for group in order.tolist()], sizes)


def test_windows_bound_the_rearrangement_and_steps_are_shuffled() -> None:
    """With a window of one step, the samples of a step are those of the plain shuffle, whatever their sizes."""
    arranged = [set(itertools.chain(*step)) for step in plan(64, window=1)]
    same = train_plan(
        np.ones((64, 2), np.int64),
        **{"digest": DIGEST, "seed": 1, "epoch": 0, "micro_batch": 2, "global_batch": 8, "window": 1, "tail": "drop"},
    )
    assert arranged == [set(itertools.chain(*step)) for step in same]
    wide = plan(640, window=640)
    heights = [float(some_sizes(640)[list(itertools.chain(*step)), 0].mean()) for step in wide]
    assert abs(np.corrcoef(heights, range(len(heights)))[0, 1]) < 0.4, "sorted windows are not visible in the steps"


def test_no_samples() -> None:
    with pytest.raises(ConfigError, match=r"data\.train holds no samples"):
        steps_per_epoch(0, 4, "wrap")
