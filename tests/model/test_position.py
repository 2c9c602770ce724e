"""Sine embeddings, and the geometry of flattened levels under padding."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.model.position import Pyramid, box_position, shrink, sine, sine_position


def mask_of(height: int, width: int, *valid: tuple[int, int]) -> Tensor:
    mask = torch.ones(len(valid), height, width, dtype=torch.bool)
    for one, (h, w) in zip(mask, valid, strict=True):
        one[:h, :w] = False
    return mask


def test_sine_interleaves_sines_and_cosines() -> None:
    t = 0.7
    slow = t / 10_000**0.5
    expected = [math.sin(t), math.cos(t), math.sin(slow), math.cos(slow)]
    assert sine(torch.tensor(t), 4).tolist() == pytest.approx(expected)


def test_sine_position_pixel_by_hand() -> None:
    """Row 1 of 3 valid rows, column 2 of 4 valid columns; y features precede x."""
    position = sine_position([(~mask_of(5, 6, (3, 4))).float()], 8).view(5, 6, 8)[1, 2]
    y, x = 1.5 / 3 * 2 * math.pi, 2.5 / 4 * 2 * math.pi
    expected = torch.cat([sine(torch.tensor(y), 4), sine(torch.tensor(x), 4)])
    torch.testing.assert_close(position, expected, atol=1e-5, rtol=0)


def test_sine_position_without_offset_equals_detr() -> None:
    position = sine_position([(~mask_of(5, 6, (3, 4))).float()], 8, offset=0.0).view(5, 6, 8)[1, 2]
    expected = torch.cat([sine(torch.tensor(2 / 3 * 2 * math.pi), 4), sine(torch.tensor(3 / 4 * 2 * math.pi), 4)])
    torch.testing.assert_close(position, expected, atol=1e-5, rtol=0)


def test_shrink_uses_nearest_pixel() -> None:
    mask = mask_of(8, 12, (5, 12), (8, 6))
    small = shrink(mask, torch.zeros(2, 1, 2, 3))
    assert torch.equal(small, mask[:, ::4, ::4])


def test_sine_position_ignores_padding() -> None:
    bare = sine_position([(~mask_of(4, 5, (4, 5))).float()], 16).view(4, 5, 16)
    padded = sine_position([(~mask_of(7, 9, (4, 5))).float()], 16).view(7, 9, 16)[:4, :5]
    torch.testing.assert_close(padded, bare)


def test_box_position_embeds_each_coordinate() -> None:
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = torch.cat([sine(c * 2 * math.pi, 6) for c in box])
    torch.testing.assert_close(box_position(box, 6), expected)


def test_pyramid_describes_levels() -> None:
    pyramid = Pyramid.of([mask_of(4, 6, (4, 6), (2, 3)), mask_of(2, 3, (2, 3), (1, 2))])
    assert pyramid.shapes == ((4, 6), (2, 3))
    assert pyramid.tokens == 30 == pyramid.padding.shape[1]
    assert pyramid.extents.tolist() == [[6, 4], [3, 2]]
    torch.testing.assert_close(pyramid.valid_ratios[0], torch.ones(2, 2))
    torch.testing.assert_close(pyramid.valid_ratios[1], torch.tensor([[0.5, 0.5], [2 / 3, 0.5]]))


def test_pyramid_levels_equal_single_pyramids() -> None:
    masks = [mask_of(4, 6, (4, 6), (2, 3)), mask_of(2, 3, (2, 3), (1, 2)), mask_of(1, 2, (1, 2), (1, 1))]
    for own, mask in zip(Pyramid.of(masks).levels(), masks, strict=True):
        alone = Pyramid.of([mask])
        assert own.shapes == alone.shapes
        for name in ("padding", "valid_ratios", "extents"):
            assert torch.equal(getattr(own, name), getattr(alone, name))


def test_pyramid_centres_on_each_level() -> None:
    pyramid = Pyramid.of([mask_of(4, 6, (2, 3)), mask_of(2, 3, (1, 2))])
    centres = pyramid.centres()
    assert centres.shape == (1, 30, 2)
    x, y = centres[0, :24].view(4, 6, 2)[1, 2].tolist()
    assert (x, y) == pytest.approx((2.5 / 3, 1.5 / 2))
    # back on its own level a pixel is where it is; on the other one the ratio of that level counts
    on_levels = pyramid.on_levels(centres)[0, :24].view(4, 6, 2, 2)[1, 2]
    assert on_levels[0].tolist() == pytest.approx([2.5 / 6, 1.5 / 4])
    assert on_levels[1].tolist() == pytest.approx([2.5 / 3 * 2 / 3, 1.5 / 2 / 2])


def test_pyramid_on_levels_scales_boxes() -> None:
    pyramid = Pyramid.of([mask_of(4, 6, (2, 3))])
    boxes = torch.rand(1, 7, 4)
    both = pyramid.on_levels(boxes)
    torch.testing.assert_close(both[..., :2], pyramid.on_levels(boxes[..., :2]))
    torch.testing.assert_close(both[..., 2:], pyramid.on_levels(boxes[..., 2:]))


def test_pyramid_proposals_exclude_padding_and_border() -> None:
    pyramid = Pyramid.of([mask_of(60, 60, (60, 30)), mask_of(30, 30, (30, 15))])
    logits, unusable = pyramid.proposals()
    boxes, bad = logits.sigmoid(), unusable[0, :, 0]
    assert torch.equal(logits.isinf().all(-1), unusable[..., 0])
    assert bad[pyramid.padding[0]].all()
    torch.testing.assert_close(boxes[0, ~bad, :2], pyramid.centres()[0, ~bad])
    first, second = boxes[0, :3600][~bad[:3600]], boxes[0, 3600:][~bad[3600:]]
    torch.testing.assert_close(first[:, 2:], torch.full_like(first[:, 2:], 0.05))
    torch.testing.assert_close(second[:, 2:], torch.full_like(second[:, 2:], 0.1))
    inside = boxes[0, ~bad]
    assert ((inside > 0.01) & (inside < 0.99)).all()
    assert bad[0]  # the first row's centre is 0.5 / 60 < 0.01 from the edge
