"""The fused resample: close to the published two steps, boxes match the pixels, and decoding is never too small."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import AugmentConfig
from pipeline.data.images import decode, decode_at_least
from pipeline.data.resample import apply_fused, decoded_size, source_box
from pipeline.data.transforms import View, apply, draw_views

AUGMENT = AugmentConfig(scales=(96, 128, 160), max_size=220, crop_scales=(80, 100), crop_range=(64, 90))
NO_BOXES, NO_LABELS = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


def smooth(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An image without fine detail, so that two ways of scaling it must agree."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def some_views(size: tuple[int, int], count: int = 40, augment: AugmentConfig = AUGMENT) -> list[View]:
    drawn = draw_views(np.tile(np.array(size, np.int64), (count, 1)), 0, 0, augment)
    return [drawn[i] for i in range(count)]


@pytest.mark.parametrize("size", [(120, 160), (160, 120), (97, 131)])
def test_apply_fused_is_close_to_apply(size: tuple[int, int]) -> None:
    boxes, labels = np.array([[10, 20, 60, 80], [70, 5, 110, 60]], np.float32), np.array([3, 4])
    for view in some_views(size):
        image, expected_boxes, expected_labels = apply(smooth(size), boxes, labels, view)
        pixels, found_boxes, found_labels = apply_fused(smooth(size), 1, boxes, labels, view, size)
        assert pixels.shape == (3, *view.out_size)
        assert pixels.dtype == np.uint8
        difference = np.abs(np.asarray(image).transpose(2, 0, 1).astype(int) - pixels)
        assert difference.mean() < 2.5, "about one grey level: the crop's edges are rounded to source pixels"
        assert found_boxes.dtype == np.float32
        wide = expected_boxes[(expected_boxes[:, 2:] - expected_boxes[:, :2]).min(axis=1) > 4]
        if len(wide) == len(expected_boxes) == len(found_boxes):
            np.testing.assert_array_equal(found_labels, expected_labels)
            np.testing.assert_allclose(found_boxes, expected_boxes, atol=0.75 * max(view.out_size) / 64)


def test_apply_fused_without_crop_differs_only_by_kernel() -> None:
    for view in (view for view in some_views((120, 160)) if view.crop is None):
        image, _, _ = apply(smooth((120, 160)), NO_BOXES, NO_LABELS, view)
        pixels, _, _ = apply_fused(smooth((120, 160)), 1, NO_BOXES, NO_LABELS, view, (120, 160))
        difference = np.abs(np.asarray(image).transpose(2, 0, 1).astype(int) - pixels)
        assert difference.max() <= 2
        assert difference.mean() < 0.1


def mark(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("shrink", [1, 2, 4])
def test_apply_fused_boxes_match_pixels(shrink: int) -> None:
    size, box = (240, 323), (100, 80, 180, 172)  # a width that no shrink divides
    whole = mark(size, box)
    decoded = whole.reduce(shrink) if shrink > 1 else whole
    assert decoded.size == (-(-323 // shrink), -(-240 // shrink))
    seen = 0
    for view in some_views(size):
        pixels, boxes, labels = apply_fused(decoded, shrink, np.array([box], np.float32), np.array([7]), view, size)
        bright = np.argwhere(pixels[0] > 127)
        if len(bright) == 0 or len(boxes) == 0:
            continue
        (y0, x0), (y1, x1) = bright.min(axis=0), bright.max(axis=0) + 1
        np.testing.assert_allclose(boxes, [[x0, y0, x1, y1]], atol=1.5 * max(1.0, shrink * 0.75))
        assert labels.tolist() == [7]
        seen += 1
    assert seen > 20


def test_apply_fused_flip_is_exact() -> None:
    image = mark((4, 10), (1, 0, 3, 4))
    pixels, boxes, _ = apply_fused(
        image, 1, np.array([[1, 0, 3, 4]], np.float32), np.array([0]), View(True, (4, 10)), (4, 10)
    )
    np.testing.assert_array_equal(boxes, [[7, 0, 9, 4]])
    np.testing.assert_array_equal(pixels, np.asarray(image)[:, ::-1].transpose(2, 0, 1))


def test_apply_fused_crop_drops_outside_boxes() -> None:
    view = View(False, (20, 20), before_crop=(40, 40), crop=(10, 10, 20, 20))
    boxes = np.array([[0, 0, 12, 12], [0, 0, 10, 40], [15, 15, 20, 20]], np.float32)
    _, kept, labels = apply_fused(Image.new("RGB", (40, 40)), 1, boxes, np.array([1, 2, 3]), view, (40, 40))
    np.testing.assert_array_equal(kept, [[0, 0, 2, 2], [5, 5, 10, 10]])
    assert labels.tolist() == [1, 3]


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    seed=st.integers(0, 1000),
    crop=st.sampled_from([0.0, 1.0]),
    shrink=st.sampled_from([1, 2, 4, 8]),
)
def test_apply_fused_any_image_works(size: tuple[int, int], seed: int, crop: float, shrink: int) -> None:
    augment = AUGMENT.model_copy(update={"crop": crop})
    view = draw_views(np.array([size], np.int64), seed, 0, augment)[0]
    left, top, right, bottom = source_box(view, size)
    assert -1e-9 <= left < right <= size[1] + 1e-9
    assert -1e-9 <= top < bottom <= size[0] + 1e-9
    decoded = Image.new("RGB", (-(-size[1] // shrink), -(-size[0] // shrink)))
    boxes = np.array([[0, 0, size[1], size[0]]], np.float32)
    pixels, boxes, labels = apply_fused(decoded, shrink, boxes, np.array([1]), view, size)
    assert pixels.shape == (3, *view.out_size)
    assert len(boxes) == len(labels) == 1
    height, width = view.out_size
    assert (boxes >= -1e-3).all()
    assert (boxes <= np.array([width, height] * 2) * (1 + 1e-5)).all()


def encoded(size: tuple[int, int], kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    smooth(size).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "at_least", "shrink"),
    [
        ((480, 640), (480, 640), 1),
        ((480, 640), (241, 320), 1),
        ((480, 640), (240, 320), 2),
        ((480, 640), (100, 160), 4),
        ((480, 640), (1, 1), 8),
        ((483, 645), (120, 161), 4),
        ((483, 645), (121, 161), 2),
        ((7, 9), (1, 1), 4),
        ((3, 3), (1, 1), 2),
        ((1, 500), (1, 60), 1),
    ],
)
def test_decoded_size_jpeg_is_not_too_small(size: tuple[int, int], at_least: tuple[int, int], shrink: int) -> None:
    image, found = decode_at_least(encoded(size), size, at_least)
    assert found == shrink
    assert image.size == (-(-size[1] // shrink), -(-size[0] // shrink))
    assert image.mode == "RGB"
    assert found == 1 or (image.height >= at_least[0] and image.width >= at_least[1])


def test_decode_at_least_png_or_whole_image_is_unchanged() -> None:
    data = encoded((48, 64))
    image, shrink = decode_at_least(data, (48, 64), (48, 64))
    assert shrink == 1
    np.testing.assert_array_equal(np.asarray(image), np.asarray(decode(data)))
    assert decode_at_least(encoded((48, 64), "PNG"), (48, 64), (1, 1))[1] == 1


def test_decoded_size_equals_size_of_view() -> None:
    assert decoded_size(View(False, (240, 320)), (480, 640)) == (240, 320)
    half = View(True, (100, 100), before_crop=(400, 400), crop=(0, 0, 200, 200))
    assert decoded_size(half, (800, 800)) == (200, 200)
    assert decoded_size(View(False, (800, 1066)), (480, 640)) == (800, 1067), "an upscale needs all there is"
