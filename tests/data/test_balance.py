"""Repeat-factor sampling: the paper's factors, an epoch of fixed length, and the same samples at any world size."""

import itertools
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data import write_shards

from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.data.balance import ONE, Epoch, draw_epoch, epoch_length, read_factors, repeat_factors
from pipeline.data.batch import Batch
from pipeline.data.loader import TrainLoader
from pipeline.data.transforms import draw_views

MANY = settings(deadline=None, max_examples=80)
CLASSES = st.lists(st.frozensets(st.integers(0, 6), max_size=3), min_size=1, max_size=60)
AUGMENT = AugmentConfig(scales=(40, 48, 56), max_size=90, crop_scales=(44, 60), crop_range=(30, 50), eval_size=48)


@MANY
@given(CLASSES, st.floats(0, 1))
def test_repeat_factors_are_those_of_the_paper(classes: list[frozenset[int]], threshold: float) -> None:
    factors = repeat_factors(classes, threshold) / ONE
    share = {one: sum(one in found for found in classes) / len(classes) for one in range(7)}
    expected = [max([1.0, *(math.sqrt(threshold / share[one]) for one in found)]) for found in classes]
    raised = int(np.argmax(factors))
    for place, (factor, value) in enumerate(zip(factors, expected, strict=True)):
        assert value - 1e-5 <= factor <= value + (1 if place == raised else 1e-5)
    assert epoch_length(repeat_factors(classes, threshold)) == pytest.approx(sum(expected), abs=1 + 1e-3)


@MANY
@given(CLASSES, st.floats(0, 1), st.integers(0, 2**64 - 1), st.integers(0, 1000))
def test_draw_epoch_shows_each_image_floor_or_ceil_of_its_factor(
    classes: list[frozenset[int]], threshold: float, seed: int, epoch: int
) -> None:
    factors = repeat_factors(classes, threshold)
    drawn = draw_epoch(factors, seed, epoch)
    assert len(drawn.samples) == epoch_length(factors)
    counts = np.bincount(drawn.samples, minlength=len(factors))
    assert (counts >= factors // ONE).all()
    assert (counts <= -(-factors // ONE)).all()
    for sample, copies in itertools.groupby(zip(drawn.samples, drawn.copies, strict=True), key=lambda pair: pair[0]):
        assert [copy for _, copy in copies] == list(range(counts[sample]))


def test_draw_epoch_shows_an_image_its_factor_times_on_average() -> None:
    classes = [frozenset({0}) if k < 90 else frozenset({1}) for k in range(100)]
    factors = repeat_factors(classes, 0.25)  # sqrt(0.25 / 0.1) = 1.58 for the last ten
    counts = [np.bincount(draw_epoch(factors, 0, epoch).samples, minlength=100) for epoch in range(400)]
    assert np.mean(counts, axis=0)[:90] == pytest.approx(1)
    assert np.mean(counts, axis=0)[91:] == pytest.approx(1.58, abs=0.12)
    assert len({tuple(count) for count in counts}) > 100, "another choice in each epoch"


def test_repeat_factors_without_a_rare_class_are_one() -> None:
    classes = [frozenset({0, 1})] * 8 + [frozenset()] * 2
    assert repeat_factors(classes, 0.5).tolist() == [ONE] * 10
    assert draw_epoch(repeat_factors(classes, 0.5), 1, 1).samples.tolist() == list(range(10))


def balanced(folder: str, workers: int = 0) -> DataConfig:
    return DataConfig(train=folder, workers=workers, window=12, mix_shards=2, augment=AUGMENT, balance=1.0)


def rows(steps: list[list[Batch]]) -> dict[tuple[int, int], tuple[object, ...]]:
    return {
        (t, batch.group): (batch.image_ids.tolist(), batch.images.numpy().tobytes(), batch.boxes_cxcywh.tolist())
        for t, step in enumerate(steps)
        for batch in step
        if batch.weight
    }


def test_loader_balanced_epoch_is_the_same_in_any_world_and_resumed_anywhere(tmp_path: Path) -> None:
    index = write_shards(tmp_path, images=14, samples_per_shard=4)
    train = TrainConfig(global_batch=4, micro_batch=2)
    data = balanced(index.folder)
    factors = read_factors(data)
    assert factors[3] == ONE, "the image without boxes"
    loader = TrainLoader(data, train, 7, 0, 1)
    assert loader.steps_per_epoch == epoch_length(factors) // 4
    whole = rows(list(loader.epoch(2)))
    assert len(whole) == 2 * loader.steps_per_epoch
    for world, workers in ((2, 0), (3, 1)):
        merged: dict[tuple[int, int], tuple[object, ...]] = {}
        for rank in range(world):
            merged |= rows(list(TrainLoader(balanced(index.folder, workers), train, 7, rank, world).epoch(2)))
        assert merged == whole
    late = rows(list(TrainLoader(data, train, 7, 0, 1).epoch(2, start_step=1)))
    assert {(t + 1, group): row for (t, group), row in late.items()} == {k: v for k, v in whole.items() if k[0] >= 1}


def test_loader_views_of_a_very_rare_image_need_no_memory_for_all_other_images(tmp_path: Path) -> None:
    loader = TrainLoader(balanced(write_shards(tmp_path, images=6).folder), TrainConfig(global_batch=2), 0, 0, 1)
    sizes = np.random.default_rng(0).integers(30, 90, (2000, 2))
    loader.index = SimpleNamespace(sizes=lambda: sizes)  # type: ignore[assignment]
    samples = np.sort(np.append(np.arange(2000), np.full(299, 7)))
    shown = Epoch(samples, np.where(samples == 7, np.arange(len(samples)) - 7, 0))
    tracemalloc.start()
    views = loader._views(shown, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 2000 * 8, "one number for every image and repeat"
    for row in (0, 6, 7, 8, 200, 306, 307, 2298):
        assert views[row] == draw_views(sizes, 0, 3, AUGMENT, int(shown.copies[row]))[int(samples[row])]


def test_loader_repeated_sample_has_another_view_each_time(tmp_path: Path) -> None:
    index = write_shards(tmp_path, images=6)
    train = TrainConfig(global_batch=1, micro_batch=1)
    loader = TrainLoader(balanced(index.folder), train, 0, 0, 1)
    loader._factors = np.full(6, 4 * ONE)  # as if every image were rare
    shown = [(batch.image_ids.item(), batch.images.numpy().tobytes()) for (batch,) in loader.epoch(0)]
    assert len(shown) == 24
    assert len(set(shown)) > 20
