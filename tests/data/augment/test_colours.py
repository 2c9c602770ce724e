"""Changes of colour: bounds, torchvision's bits, the size unchanged, and the same values whatever runs beside them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.data import noise_image

from pipeline.config.augment import Extras
from pipeline.data.augment.colours import add_noise, change_colours, turn_hue
from pipeline.data.augment.draws import Draws

EDGES = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
IMAGE = Image.blend(noise_image((40, 56), 3), EDGES, 0.5)
EVERY = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.5, "hue": 0.1, "grayscale": 1.0, "blur": 1.0, "noise": 1.0}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int32)


def test_change_colours_nothing_asked_returns_the_image() -> None:
    assert change_colours(IMAGE, Extras(), Draws(0, 1)) is IMAGE


@pytest.mark.parametrize(("name", "value"), EVERY.items())
def test_change_colours_each_setting_changes_pixels_and_keeps_the_size(name: str, value: float) -> None:
    extras = dataclasses.replace(Extras(), **{name: value})
    changed = change_colours(IMAGE, extras, Draws(5, 1))
    assert changed.size == IMAGE.size
    assert changed.mode == "RGB"
    assert changed != IMAGE
    assert change_colours(IMAGE, extras, Draws(5, 1)) == changed
    assert name == "grayscale" or change_colours(IMAGE, extras, Draws(6, 1)) != changed


def test_change_colours_brightness_stays_within_its_bound() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    values = [pixels(change_colours(grey, Extras(brightness=0.2), Draws(k, 1))).max() for k in range(300)]
    assert 79 <= min(values) < 83
    assert 117 < max(values) <= 120


def test_change_colours_grayscale_has_equal_bands() -> None:
    grey = pixels(change_colours(IMAGE, Extras(grayscale=1.0), Draws(0, 1)))
    assert (grey == grey[..., :1]).all()


def test_kernels_have_the_bits_of_torchvision() -> None:
    from torchvision.transforms.v2 import functional

    draws: Any = Draws(9, 1)
    factor = draws.between(0.6, 1.4)
    for extras, kernel in (
        (Extras(brightness=0.4), functional.adjust_brightness),
        (Extras(contrast=0.4), functional.adjust_contrast),
        (Extras(saturation=0.4), functional.adjust_saturation),
    ):
        assert change_colours(IMAGE, extras, Draws(9, 1)) == kernel(IMAGE, factor)
    for turn in (0.0, 0.1, -0.1, 0.5):
        assert np.abs(pixels(turn_hue(IMAGE, turn)) - pixels(functional.adjust_hue(IMAGE, turn))).max() <= 6


@pytest.mark.parametrize("deviation", [0.0, 5.0, 40.0])
def test_add_noise_has_the_deviation_and_no_mean(deviation: float) -> None:
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    noise = pixels(add_noise(grey, deviation, Draws(1, 1))) - 128
    assert abs(noise.std() - deviation) <= 0.03 * deviation + 0.01
    assert abs(noise.mean()) < 0.3
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02 if deviation else True


def test_values_are_fixed_across_versions() -> None:
    """A run that is resumed after an upgrade must see the same pixels; a change here belongs in the CHANGELOG."""
    assert Draws(1, 2, 3, 0, 1).octets(9).tolist() == [192, 187, 17, 41, 91, 31, 54, 77, 91]
    draws = Draws(1, 2, 3, 0, 1)
    assert (draws.below(1000), draws.order(5), round(draws.share(), 9)) == (301, [4, 0, 1, 2, 3], 0.249735109)
