"""Batches: images of one size go together, and an image's detections do not depend on the others."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.helpers import tiny_checkpoint, tiny_config
from support.model import VARIANTS, small_config, small_detr

from pipeline.checkpoint import load_inference
from pipeline.data.batch import Item
from pipeline.inference.predictor import NO_BOXES, NO_LABELS, Limits, Predictor
from pipeline.serving.batching import detect_all, group_by_size

MODELS = {
    **{name: {"model": small_config(**changes)} for name, changes in VARIANTS.items()},
    "detr": {"model": small_detr(), "loss": {"classification": "softmax"}},
}


def item(height: int, width: int, seed: int = 0) -> Item:
    pixels = np.random.default_rng(seed).integers(0, 255, (3, height, width), np.uint8)
    return Item(pixels, NO_BOXES, NO_LABELS, seed, (height, width))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2))), st.integers(1, 4))
def test_group_by_size_holds_each_once_in_groups_of_one_size(sizes: list[tuple[int, int]], largest: int) -> None:
    groups = group_by_size([item(*size) for size in sizes], largest)
    assert sorted(k for group in groups for k in group) == list(range(len(sizes)))
    for group in groups:
        assert len({sizes[k] for k in group}) == 1
        assert group == sorted(group)
        assert len(group) <= largest
    for size in set(sizes):  # as few groups as there can be
        of_size = [group for group in groups if sizes[group[0]] == size]
        assert len(of_size) == -(-sizes.count(size) // largest)


@pytest.mark.parametrize("name", MODELS)
def test_detections_do_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    """Models whose norms see padding, too, because nothing is padded; alone, the bits are those of a call."""
    sections = {key: value if key == "loss" else value.model_dump() for key, value in MODELS[name].items()}
    predictor = Predictor(load_inference(tiny_checkpoint(tmp_path, config=tiny_config(**sections))), "cpu")
    sizes = [(120, 90), (60, 80), (120, 90), (120, 90), (60, 80)]
    noise = np.random.default_rng(1)
    images = [Image.fromarray(noise.integers(0, 255, (height, width, 3), np.uint8)) for width, height in sizes]
    limits = [Limits(0, 5), Limits(0, 5), Limits(0, 3), Limits(0.1, 100), Limits(0, 1)]
    alone = [predictor(image, **limit._asdict()) for image, limit in zip(images, limits, strict=True)]
    work = [(predictor.prepare(image), limit) for image, limit in zip(images, limits, strict=True)]
    for largest in (1, 2, 8):
        found = detect_all(predictor.detect_batch, work, largest)
        for one, expected in zip(found, alone, strict=True):
            assert not isinstance(one, Exception)
            assert (one.size, one.labels) == (expected.size, expected.labels)
            tolerance = 1e-5 * (largest > 1)
            np.testing.assert_allclose(one.scores, expected.scores, rtol=0, atol=tolerance)
            np.testing.assert_allclose(one.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=200 * tolerance)


def test_fault_of_a_group_is_the_result_of_its_images_alone() -> None:
    def fails_on_wide(items: list[Item], limits: list[Limits]) -> list[int]:
        if items[0].extent == (1, 2):
            raise ValueError("wide")
        return [item.image_id for item in items]

    work = [(item(1, 1, 0), Limits(0, 1)), (item(1, 2, 1), Limits(0, 1)), (item(1, 1, 2), Limits(0, 1))]
    first, second, third = detect_all(fails_on_wide, work, 8)  # type: ignore[arg-type]
    assert (first, third) == (0, 2)
    assert isinstance(second, ValueError)
