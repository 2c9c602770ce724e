"""Turned and warped boxes are where the pixels are; boxes that leave the image follow one rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drawn_boxes import assert_boxes_match, assert_dropped_are_gone, drawn_images, seen_boxes

from pipeline.config.augment import Extras
from pipeline.data.augment.compose import LabelledImage
from pipeline.data.augment.draws import Draws
from pipeline.data.augment.warp import (
    Affine,
    clip_boxes,
    draw_affine,
    turn_boxes,
    turn_image,
    turn_size,
    warp_boxes,
    warp_image,
)

MANY = settings(deadline=None, max_examples=60)


def warp(drawn: LabelledImage, affine: Affine, min_visible: float = 0.2) -> LabelledImage:
    boxes = warp_boxes(drawn.boxes_xyxy, affine, drawn.size)
    boxes, labels = clip_boxes(boxes, drawn.labels, drawn.size, min_visible)
    return LabelledImage(warp_image(drawn.image, affine), boxes, labels)


@MANY
@given(drawn_images(), st.integers(0, 3))
def test_turn_boxes_are_exactly_where_the_pixels_are(drawn: LabelledImage, turns: int) -> None:
    turned = LabelledImage(
        turn_image(drawn.image, turns), turn_boxes(drawn.boxes_xyxy, turns, drawn.size), drawn.labels
    )
    assert turned.size == turn_size(drawn.size, turns)
    assert turned.boxes_xyxy.dtype == np.float32
    assert_boxes_match(turned, 0)


@MANY
@given(drawn_images(), st.floats(0.5, 2), st.tuples(st.floats(-40, 40), st.floats(-40, 40)), st.floats(0, 1))
def test_warp_moved_and_zoomed_boxes_match_the_pixels(
    drawn: LabelledImage, zoom: float, move: tuple[float, float], min_visible: float
) -> None:
    affine = Affine(0, zoom, (0, 0), move)
    warped = warp(drawn, affine, min_visible)
    assert_boxes_match(warped, 1.0)
    assert_dropped_are_gone(drawn, warped, zoom, min_visible)


@MANY
@given(drawn_images(), st.floats(-180, 180), st.tuples(st.floats(-20, 20), st.floats(-20, 20)))
def test_warp_rotated_boxes_hold_the_pixels_and_fit_inside_the_image(
    drawn: LabelledImage, angle: float, shear: tuple[float, float]
) -> None:
    affine = Affine(angle, 0.7, shear, (0, 0))
    warped, free = warp(drawn, affine), warp_boxes(drawn.boxes_xyxy, affine, drawn.size)
    seen = seen_boxes(warped.image)
    whole = dict(zip(drawn.labels.tolist(), free, strict=True))
    for label, box in zip(warped.labels.tolist(), warped.boxes_xyxy, strict=True):
        assert (box[:2] <= seen[label][:2] + 1).all()
        assert (box[2:] >= seen[label][2:] - 1).all()
        if np.array_equal(whole[label], box):  # not cut; thin tips of a rotated rectangle are blurred away
            np.testing.assert_allclose(box, seen[label], atol=2.5)


@MANY
@given(st.integers(0, 2**32), st.floats(0, 180), st.floats(0, 0.9), st.floats(0, 60))
def test_draw_affine_stays_within_its_bounds(seed: int, rotate: float, translate: float, shear: float) -> None:
    extras = Extras(rotate=rotate, translate=translate, shear=shear, zoom=(0.5, 2.0))
    affine = draw_affine((60, 80), extras, Draws(seed, 1))
    assert abs(affine.angle) <= rotate
    assert 0.5 <= affine.zoom <= 2
    assert max(map(abs, affine.shear)) <= shear
    assert abs(affine.move[0]) <= 80 * translate
    assert abs(affine.move[1]) <= 60 * translate
    assert np.linalg.det(affine.matrix((60, 80))) == pytest.approx(affine.zoom**2, rel=1e-6)


def test_warp_boxes_equal_those_of_torchvision() -> None:
    torch = pytest.importorskip("torch")
    from torchvision.transforms.v2.functional import affine_bounding_boxes
    from torchvision.tv_tensors import BoundingBoxFormat

    boxes = np.array([[3, 4, 20, 31], [40, 2, 44, 60]], np.float32)
    for affine in (Affine(30, 1.3, (5, -7), (4, -6)), Affine(-75, 0.5, (0, 12), (0, 0))):
        expected = affine_bounding_boxes(
            torch.from_numpy(boxes), BoundingBoxFormat.XYXY, (64, 48), affine.angle, list(affine.move), affine.zoom,
            list(affine.shear), clamping_mode=None,
        )  # fmt: skip
        np.testing.assert_allclose(warp_boxes(boxes, affine, (64, 48)), expected.numpy(), atol=1e-3)


def test_clip_boxes_cuts_and_drops_by_area_and_side() -> None:
    boxes = np.array([[-5, 0, 5, 10], [-8, 0, 2, 10], [-9.5, 0, 0.5, 10], [2, 2, 2.5, 4], [20, 0, 30, 9]], np.float32)
    labels = np.arange(5)
    cut, left = clip_boxes(boxes, labels, (10, 20), 0.2)
    assert left.tolist() == [0, 1, 3]
    np.testing.assert_array_equal(cut, [[0, 0, 5, 10], [0, 0, 2, 10], [2, 2, 2.5, 4]])
    assert clip_boxes(boxes, labels, (10, 20), 0.3)[1].tolist() == [0, 3]
    assert clip_boxes(boxes, labels, (10, 20), 1.0)[1].tolist() == [3]
    assert clip_boxes(boxes[:0], labels[:0], (10, 20), 0.2)[0].shape == (0, 4)
