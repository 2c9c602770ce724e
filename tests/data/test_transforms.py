"""The published augmentation: sizes, distribution, and boxes that match the pixels."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import AugmentConfig
from pipeline.data.transforms import (
    EvalSize,
    View,
    Views,
    apply,
    draw_views,
    evaluation_view,
    evaluation_views,
    resize_sizes,
)

AUGMENT = AugmentConfig()
SMALL = AugmentConfig(scales=(96, 128), max_size=200, crop_scales=(80, 100), crop_range=(64, 90), eval_size=112)


def views(size: tuple[int, int], count: int, augment: AugmentConfig = AUGMENT) -> list[View]:
    drawn = draw_views(np.tile(np.array(size, np.int64), (count, 1)), 0, 0, augment)
    return [drawn[i] for i in range(count)]


def one_view(size: tuple[int, int], seed: int, augment: AugmentConfig) -> View:
    return draw_views(np.array([size], np.int64), seed, 0, augment)[0]


@pytest.mark.parametrize(
    ("size", "shortest", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.67 is truncated
        ((640, 480), 800, 1333, (1066, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 640), 800, 1333, (625, 1333)),  # longest binds: 1333 * 300 / 640 = 624.8 is rounded
        ((480, 640), 480, 1333, (480, 640)),
        ((500, 500), 800, 1333, (800, 800)),
        ((1, 2000), 800, 1333, (1, 2000)),  # rounding to 0 pixels is impossible
        ((20_000_000, 1), 800, 1333, (2666, 1)),  # a file of a few bytes must not become a huge input
        ((480, 1000), 600, None, (600, 1250)),
    ],
)
def test_resize_sizes_follows_published_rule(
    size: tuple[int, int], shortest: int, longest: int | None, expected: tuple[int, int]
) -> None:
    assert tuple(resize_sizes(np.array([size], np.int64), np.int64(shortest), longest)[0].tolist()) == expected


def published_size(size: tuple[int, int], shortest: int, longest: int | None) -> tuple[int, int]:
    """The rule for one image in Python's own arithmetic."""
    small, large = min(size), max(size)
    if longest is not None and large / small * shortest > longest:
        shortest = max(1, round(longest * small / large))
    height, width = size
    if small != shortest and width < height:
        height, width = int(shortest * height / width), shortest
    elif small != shortest:
        height, width = shortest, int(shortest * width / height)
    if small / large * (longest or large) < 0.5:  # a line of pixels
        return min(height, 2 * (longest or height)), min(width, 2 * (longest or width))
    return height, width


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    shortest=st.integers(1, 2000),
    longest=st.one_of(st.none(), st.integers(1, 3000)),
)
def test_resize_sizes_many_equal_single(sizes: list[tuple[int, int]], shortest: int, longest: int | None) -> None:
    found = resize_sizes(np.array(sizes, np.int64), np.int64(shortest), longest)
    assert [tuple(size) for size in found.tolist()] == [published_size(size, shortest, longest) for size in sizes]


def test_evaluation_view_has_published_size() -> None:
    assert evaluation_view((480, 640), AUGMENT) == View(False, (800, 1066))
    many = evaluation_views(np.array([[480, 640], [640, 480]]), EvalSize.default(AUGMENT))
    assert [many[0], many[1]] == [View(False, (800, 1066)), View(False, (1066, 800))]
    assert evaluation_view((480, 640), AUGMENT.model_copy(update={"eval_size": 600})).out_size == (600, 800)


def test_draw_views_has_published_probabilities() -> None:
    drawn = views((480, 640), 4000)
    assert abs(np.mean([view.flip for view in drawn]) - 0.5) < 0.03
    assert abs(np.mean([view.crop is not None for view in drawn]) - 0.5) < 0.03
    counts = Counter(min(view.out_size) for view in drawn if view.crop is None)
    assert set(counts) == set(AUGMENT.scales)
    assert min(counts.values()) > 0.6 * max(counts.values())
    cropped = [view for view in drawn if view.crop is not None]
    assert {min(view.before_crop or ()) for view in cropped} == set(AUGMENT.crop_scales)
    sides = np.array([view.crop[2:] for view in cropped if view.crop])
    assert (sides.min(), sides.max()) == (384, 600)
    tall = [view for view in cropped if view.before_crop == (600, 800) and view.crop]
    assert max(view.crop[0] for view in tall if view.crop) > 100, "the crop's place varies"


@settings(deadline=None)  # a busy machine is no fault
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    seed=st.integers(0, 2**32),
    augment=st.sampled_from([AUGMENT, SMALL, SMALL.model_copy(update={"crop": 1.0})]),
)
def test_draw_views_crop_lies_in_any_image(size: tuple[int, int], seed: int, augment: AugmentConfig) -> None:
    view = one_view(size, seed, augment)
    assert view == one_view(size, seed, augment), "a pure function of the seed"
    assert min(view.out_size) >= 1
    if view.crop is not None and view.before_crop is not None:
        top, left, height, width = view.crop
        assert 0 <= top <= view.before_crop[0] - height
        assert 0 <= left <= view.before_crop[1] - width
        assert min(augment.crop_range[0], view.before_crop[1]) <= width <= augment.crop_range[1]


def same(a: Views, b: Views, count: int) -> bool:
    return all(a[i] == b[i] for i in range(count))


def test_draw_views_differ_by_seed_epoch_and_sample() -> None:
    sizes = np.full((200, 2), 640)
    drawn = {key: draw_views(sizes, *key, AUGMENT) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}
    distinct = {view for views in drawn.values() for view in (views[i] for i in range(200)) if view.crop}
    assert len(distinct) > 0.95 * sum(int(views.cropped.sum()) for views in drawn.values())


def test_draw_views_do_not_depend_on_other_samples() -> None:
    """The same sample in the same place has the same view, however many samples there are and whatever their sizes."""
    sizes = np.random.default_rng(0).integers(100, 900, (50, 2))
    whole = draw_views(sizes, 3, 7, AUGMENT)
    assert same(draw_views(sizes[:20], 3, 7, AUGMENT), whole, 20)
    others = sizes.copy()
    others[::2] = 111
    changed = draw_views(others, 3, 7, AUGMENT)
    assert all(changed[i] == whole[i] for i in range(1, 50, 2))


def test_draw_views_are_fixed_across_versions() -> None:
    """A run that is resumed after an upgrade must see the same pixels; a change here belongs in the CHANGELOG."""
    assert views((480, 640), 4) == [
        View(flip=True, out_size=(768, 1024), before_crop=None, crop=None),
        View(flip=True, out_size=(847, 768), before_crop=(600, 800), crop=(50, 16, 509, 461)),
        View(flip=False, out_size=(875, 736), before_crop=(600, 800), crop=(1, 209, 597, 502)),
        View(flip=False, out_size=(544, 725), before_crop=None, crop=None),
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"flip": 0.0}, False), ({"flip": 1.0}, True)],
)
def test_draw_views_probabilities_of_zero_and_one(change: dict[str, Any], expected: bool) -> None:
    drawn = views((480, 640), 300, AUGMENT.model_copy(update=change))
    assert {view.flip for view in drawn} == {expected}
    for crop in (0.0, 1.0):
        some = views((480, 640), 300, AUGMENT.model_copy(update={"crop": crop}))
        assert {view.crop is not None for view in some} == {crop == 1.0}


def mark(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("seed", range(12))
def test_apply_boxes_match_pixels(seed: int) -> None:
    size, box = (120, 160), (50, 40, 90, 85)
    view = one_view(size, seed, SMALL)
    image, boxes, labels = apply(mark(size, box), np.array([box], np.float32), np.array([7]), view)
    assert (image.height, image.width) == view.out_size
    bright = np.argwhere(np.asarray(image)[..., 0] > 127)
    if len(bright) == 0:
        assert len(boxes) == len(labels) == 0
        return
    (y0, x0), (y1, x1) = bright.min(axis=0), bright.max(axis=0) + 1
    np.testing.assert_allclose(boxes, [[x0, y0, x1, y1]], atol=1.5)
    assert labels.tolist() == [7]
    assert boxes.dtype == np.float32


def test_apply_crop_clamps_and_drops_boxes() -> None:
    view = View(False, (20, 20), before_crop=(40, 40), crop=(10, 10, 20, 20))
    boxes = np.array([[0, 0, 12, 12], [0, 0, 10, 40], [15, 15, 20, 20]], np.float32)
    _, kept, labels = apply(Image.new("RGB", (40, 40)), boxes, np.array([1, 2, 3]), view)
    np.testing.assert_array_equal(kept, [[0, 0, 2, 2], [5, 5, 10, 10]])
    assert labels.tolist() == [1, 3]


def test_apply_image_without_boxes() -> None:
    view = one_view((50, 60), 1, SMALL)
    _, boxes, labels = apply(Image.new("RGB", (60, 50)), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), view)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)


def test_apply_flip_is_exact() -> None:
    image = mark((4, 10), (1, 0, 3, 4))
    flipped, boxes, _ = apply(image, np.array([[1, 0, 3, 4]], np.float32), np.array([0]), View(True, (4, 10)))
    np.testing.assert_array_equal(boxes, [[7, 0, 9, 4]])
    np.testing.assert_array_equal(np.asarray(flipped), np.asarray(image)[:, ::-1])
