"""Conversion of images with more than 8 bits to 8 bits: one rule for training, linting and prediction.

Each type has a range: 0 to 65,535 for integers of 16 bits and more, 0 to 1 for floats. If all values lie in that range
and the largest is above a sixteenth of it, the range scales them; integers then keep their upper 8 bits, as Pillow does
for 16-bit colours. Otherwise the image's smallest value becomes 0 and its largest 255. In the range of its type, a
12-bit scan in a 16-bit file would be black. The three colours share one range; alpha is dropped.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Values = NDArray[Any]  # [h, w] or [h, w, 3]
RANGES = {"I;16": 65535.0, "I;16L": 65535.0, "I;16B": 65535.0, "I;16N": 65535.0, "I": 65535.0, "F": 1.0}  # by mode
DARK = 1 / 16  # share of the range
# Pillow keeps the upper byte of 16-bit colours. Unpacking with the opposite byte order gives the lower byte. Two bytes
# of grey and two of alpha are unpacked as four bands.
OTHER_BYTES = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L", "LA;16B": "RGBA"}
PNG_BITS = 24  # position of the bit depth in the header of a PNG


def is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether an image file has more than 8 bits per value; `image` is opened from `data` (at least its header)."""
    return image.mode in RANGES or (image.format == "PNG" and data[PNG_BITS] == 16)


def deep_values(image: Image.Image, data: bytes) -> tuple[Values, float]:
    """The values of an image file that `is_deep`, and the upper end of their type's range.

    Args:
        image: opened from `data` and loaded.
        data: the file.
    """
    if image.mode in RANGES:
        return np.asarray(image), RANGES[image.mode]
    deep = Image.open(io.BytesIO(data), formats=("PNG",))
    (tile,) = deep.tile
    deep.tile = [tile._replace(args=OTHER_BYTES[str(tile.args)])]
    other = np.asarray(deep).astype(np.uint16)
    if tile.args == "LA;16B":
        return other[..., 0] << 8 | other[..., 1], RANGES["I;16"]
    return np.asarray(image).astype(np.uint16)[..., :3] << 8 | other[..., :3], RANGES["I;16"]


def value_range(values: Values, top: float) -> tuple[float, float, bool]:
    """The smallest value, the largest value, and whether these two scale the image (else the type's range does).

    NaN and infinities are ignored. An image with a single value is scaled by the type's range.

    Args:
        values: of any number type.
        top: upper end of the type's range, from RANGES.
    """
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return low, high, low < high and not (low >= 0 and top * DARK < high <= top)


def to_8_bits(values: Values, top: float) -> NDArray[np.uint8]:
    """Convert values to 8 bits by the module's rule; NaN becomes 0. Shape is kept, arguments as in `value_range`."""
    low, high, own = value_range(values, top)
    if own:
        known = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
        return np.rint((known - low) / (high - low) * 255).astype(np.uint8)
    known = np.clip(values, 0, top)
    return (np.rint(np.nan_to_num(known, nan=0.0) * 255) if top == 1 else known // 256).astype(np.uint8)


def to_rgb_8_bits(values: Values, top: float) -> Image.Image:
    """`to_8_bits` as an RGB image."""
    return Image.fromarray(to_8_bits(values, top)).convert("RGB")
