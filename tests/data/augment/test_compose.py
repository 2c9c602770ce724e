"""Mosaics and pasted objects: boxes are where the pixels are, and nothing is hidden more than the rule allows."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.drawn_boxes import assert_boxes_match, draw_rectangles, drawn_images, seen_boxes

from pipeline.config.augment import Extras
from pipeline.data.augment.compose import LabelledImage, draw_tiles, make_mosaic, paste_objects
from pipeline.data.augment.draws import Draws

MANY = settings(deadline=None, max_examples=60)
SIZES = st.tuples(st.integers(2, 150), st.integers(2, 150))


@MANY
@given(SIZES, st.integers(0, 2**32))
def test_draw_tiles_cover_the_frame_once(size: tuple[int, int], seed: int) -> None:
    covered = np.zeros(size, int)
    for tile in draw_tiles(size, Draws(seed, 1)):
        covered[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] += 1
    assert (covered == 1).all()


def test_draw_tiles_of_a_line_of_pixels_are_none() -> None:
    assert draw_tiles((1, 50), Draws(1, 1)) == []


@MANY
@given(st.tuples(st.integers(60, 150), st.integers(60, 150)), st.integers(0, 2**32), st.data())
def test_make_mosaic_boxes_match_the_pixels(size: tuple[int, int], seed: int, data: st.DataObject) -> None:
    tiles = draw_tiles(size, Draws(seed, 1))
    # one tile's labels are colours that no other tile has
    images = [data.draw(drawn_images(labels)) for labels in ((0, 1), (2, 3), (4,), (5,))]
    mosaic = make_mosaic(size, tiles, images, 0.2)
    assert mosaic.size == size
    assert_boxes_match(mosaic, 1.5)
    for tile, image in zip(tiles, images, strict=True):
        for label in image.labels.tolist():
            for box in mosaic.boxes_xyxy[mosaic.labels == label]:
                assert (box >= [tile.left, tile.top] * 2).all()
                assert (box <= [tile.left + tile.width, tile.top + tile.height] * 2).all()
        for label, box in seen_boxes(mosaic.image).items():
            if label in image.labels.tolist() and label not in mosaic.labels.tolist():
                whole = image.boxes_xyxy[image.labels.tolist().index(label)]
                visible = (box[2:] - box[:2] - 1).clip(0).prod()
                assert visible <= 0.2 * (whole[2:] - whole[:2]).prod() * tile.scale(image.size) ** 2 + 1


@MANY
@given(drawn_images((0, 1, 2)), drawn_images((3, 4, 5)), st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0]))
def test_paste_objects_boxes_match_the_pixels(
    target: LabelledImage, source: LabelledImage, seed: int, min_visible: float
) -> None:
    before = target.image.copy()
    pasted = paste_objects(target, source, Extras(paste_boxes=6, min_visible=min_visible), Draws(seed, 1))
    assert target.image == before, "the image of the target is not changed"
    assert pasted.size == target.size
    old = len(target.labels)
    assert pasted.labels[:old].tolist() == target.labels.tolist()
    np.testing.assert_array_equal(pasted.boxes_xyxy[:old], target.boxes_xyxy)
    assert set(pasted.labels[old:].tolist()) <= set(source.labels.tolist())
    seen = seen_boxes(pasted.image)
    for label, box in zip(pasted.labels.tolist(), pasted.boxes_xyxy, strict=True):
        area = (box[2:] - box[:2]).prod()
        if min_visible == 1:  # nothing may be hidden
            np.testing.assert_allclose(box, seen[label], atol=0.01)
        elif min_visible * area > 8:
            assert label in seen, f"label {label} is hidden"
            assert (box[:2] <= seen[label][:2] + 0.01).all()
            assert (box[2:] >= seen[label][2:] - 0.01).all()


def test_paste_objects_hides_no_box_by_more_than_the_rule() -> None:
    target = draw_rectangles((64, 96), [(0, 0, 96, 64)], [0])
    source = draw_rectangles((64, 96), [(0, 0, 60, 40), (64, 44, 90, 60)], [1, 2])
    counts = set()
    for seed in range(200):
        pasted = paste_objects(target, source, Extras(paste_boxes=2, min_visible=0.8), Draws(seed, 1))
        hidden = 1 - (np.asarray(pasted.image) == (255, 0, 0)).all(axis=-1).mean()
        assert hidden <= 0.2
        counts.add(len(pasted.labels))
    assert counts == {1, 2, 3} or counts == {1, 2}


def test_paste_objects_brings_what_lies_in_the_cut_out() -> None:
    target = draw_rectangles((64, 96), [], [])
    source = draw_rectangles((64, 96), [(10, 10, 60, 50), (20, 20, 38, 38), (58, 12, 90, 40)], [0, 1, 2])
    seen = set()
    for seed in range(60):
        pasted = paste_objects(target, source, Extras(paste_boxes=1), Draws(seed, 1))
        seen.add(tuple(sorted(pasted.labels.tolist())))
        if 1 in pasted.labels:
            np.testing.assert_allclose(
                pasted.boxes_xyxy[pasted.labels == 1][0], seen_boxes(pasted.image)[1], atol=1.5, rtol=0
            )
    assert seen == {(0, 1), (1,), (2,)}, "the third shows too little of itself beside the first"


def test_boxes_too_thin_for_their_place_are_left_out() -> None:
    thin = np.array([[0.25, 0.25, 0.25 + 2**-25, 0.25 + 2**-25], [10, 10, 50, 50]], np.float32)
    image = LabelledImage(Image.new("RGB", (400, 300)), thin, np.array([0, 1]))
    for seed in range(20):
        draws = Draws(seed, 1)
        mosaic = make_mosaic(image.size, draw_tiles(image.size, draws), [image] * 4, 0.2)
        pasted = paste_objects(mosaic, image, Extras(min_visible=0.0), draws)
        for boxes in (mosaic.boxes_xyxy, pasted.boxes_xyxy):
            assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_paste_objects_of_an_image_without_boxes_changes_nothing() -> None:
    target = draw_rectangles((64, 96), [(3, 3, 20, 20)], [0])
    pasted = paste_objects(target, draw_rectangles((10, 10), [], []), Extras(), Draws(0, 1))
    assert pasted.image == target.image
    assert pasted.labels.tolist() == [0]
