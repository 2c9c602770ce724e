"""Opens image files that may be hostile or broken: JPEG and PNG only, sizes checked before any pixel is decoded.

Faults are ShardErrors without the sample's name, which the caller adds. Images have their stored orientation;
`read_orientation` and `turn_upright` give the displayed one.
"""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from pipeline.data.values import DARK, RANGES, deep_values, is_deep, to_rgb_8_bits, value_range
from pipeline.errors import ShardError

Size = tuple[int, int]  # (height, width)
MAX_PIXELS = 64_000_000  # COCO's largest is 0.4 M; below Pillow's own warning at 89 M
MAX_BYTES = 64 * 2**20  # of one member of a tar: nothing larger is read into memory
ORIENTATION = 0x0112  # tag of EXIF
UPRIGHT = {  # EXIF orientation: the transformation from the stored image to the displayed one
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}


def extension(data: bytes) -> str:
    """`jpg` or `png`, from the first bytes; the file's name does not count. Raises ShardError for anything else."""
    for magic, name in MAGIC.items():
        if data.startswith(magic):
            return name
    raise ShardError("is neither JPEG nor PNG (its first bytes say so); convert it, or leave it out of the annotations")


def open_image(data: bytes, size: Size | None = None) -> Image.Image:
    """Read the header only and check it.

    Args:
        data: the file's bytes, or at least its header.
        size: (height, width) in the annotations; None without annotations.

    Raises:
        ShardError: another format, a broken header, another size, or more than MAX_PIXELS.
    """
    kind = extension(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF says nothing
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("JPEG",) if kind == "jpg" else ("PNG",))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ShardError(f"has more than {MAX_PIXELS:,} pixels; scale it down") from None
    except (OSError, SyntaxError, ValueError, zlib.error) as error:
        raise ShardError(f"has a broken {kind} header: {error}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ShardError(f"has {width} x {height} pixels, more than {MAX_PIXELS:,}; scale it down")
    if size is not None and (height, width) != size:
        raise ShardError(
            f"is {width} x {height} pixels but its annotation says {size[1]} x {size[0]}; correct one of them"
        )
    return image


def check_decodes(data: bytes, size: Size) -> Image.Image:
    """Prove that all of the file decodes; a JPEG at 1/8 scale, which reads every byte in a third of the time.

    Args:
        data: the file's bytes.
        size: (height, width) as stored.

    Returns:
        The image as stored, in its own mode; a JPEG at 1/8 scale.

    Raises:
        ShardError: see `open_image`; also a truncated or corrupt body.
    """
    image = open_image(data, size)
    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    _load(image)
    return image


def decode(data: bytes, size: Size | None = None) -> Image.Image:
    """The image as RGB [h, w, 3] in stored orientation: grayscale, CMYK and palettes are converted, alpha is dropped.

    More than 8 bits become 8 by the rule of `values`.

    Raises:
        ShardError: see `check_decodes`.
    """
    image = open_image(data, size)
    _load(image)
    return _decoded_rgb(image, data)


def decode_at_least(data: bytes, size: Size, at_least: Size, orientation: int = 1) -> tuple[Image.Image, int]:
    """`decode`, but a JPEG that may be smaller is decoded at 1/2, 1/4 or 1/8 scale, which saves most of the time.

    Args:
        data: the file's bytes.
        size: (height, width) in the annotations, of the image rotated by `orientation`.
        at_least: minimum (height, width) of the result, unless the image itself is smaller.
        orientation: the EXIF orientation to apply; 1 leaves the image as stored.

    Returns:
        The image as RGB, rotated, and the divisor of its size: 1, 2, 4 or 8; sides are rounded up.

    Raises:
        ShardError: see `check_decodes`.
    """
    image = open_image(data, turned_size(size, orientation))
    height, width = size
    fitting = [s for s in (8, 4, 2) if height // s >= max(1, at_least[0]) and width // s >= max(1, at_least[1])]
    if orientation != 1:  # a mirrored side with a partial pixel would start with that pixel
        fitting = [s for s in fitting if height % s == width % s == 0]
    shrink = fitting[0] if fitting and image.format == "JPEG" else 1
    if shrink > 1:
        stored_height, stored_width = turned_size(size, orientation)
        image.draft(None, (stored_width // shrink, stored_height // shrink))
    _load(image)
    assert image.size == tuple(-(-side // shrink) for side in turned_size((width, height), orientation))
    return turn_upright(_decoded_rgb(image, data), orientation), shrink


def read_orientation(source: Image.Image | bytes) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 (as stored) if it has none or a broken one.

    In a PNG it counts only before the pixels, as in most readers; so call this before the image is loaded.

    Args:
        source: an image opened by Pillow, or a file's bytes (at least its header).

    Raises:
        ShardError: the bytes are not an image, see `open_image`.
    """
    image = open_image(source) if isinstance(source, bytes) else source
    if "exif" not in image.info:
        return 1
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF says nothing
            exif.load(image.info["exif"])
            found = exif.get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1
    return int(found) if found in UPRIGHT else 1


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image as viewers show it; `image` itself for orientation 1. Orientations 5 to 8 swap width and height.

    Args:
        image: in stored orientation, of any mode.
        orientation: from `read_orientation`.
    """
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def turned_size(size: Size, orientation: int) -> Size:
    """(height, width) after `turn_upright`: stored to displayed size, or displayed to stored size."""
    return (size[1], size[0]) if orientation >= 5 else size


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; the image itself if it is RGB already. Alpha is dropped; 16 bits: see `values`."""
    if image.mode in RANGES:
        return to_rgb_8_bits(np.asarray(image), RANGES[image.mode])
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("P", "RGBa"):  # a palette may hold transparency; only RGBA converts it without a warning
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def has_alpha(image: Image.Image) -> bool:
    """Whether an opened image has transparency, which `to_rgb` drops."""
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def deep_range(data: bytes) -> tuple[float, float, bool] | None:
    """`values.value_range` of an image file of more than 8 bits; None for others. Raises ShardError, see `decode`."""
    image = open_image(data)
    if not is_deep(image, data):
        return None
    _load(image)
    return value_range(*deep_values(image, data))


def _decoded_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """`to_rgb` of a loaded image file; dark 16-bit colours keep their lower bits, which Pillow drops.

    The result has no EXIF tag, because the caller rotates it; with a tag the predictor would rotate it again.
    """
    image.info.pop("exif", None)
    if image.mode in ("RGB", "RGBA") and is_deep(image, data) and _largest(to_rgb(image)) < 256 * DARK:
        return to_rgb_8_bits(*deep_values(image, data))
    return to_rgb(image)


def _largest(image: Image.Image) -> int:
    """The largest value of an RGB image."""
    return max(int(high) for _, high in image.getextrema())  # type: ignore[misc]  # a pair for each band


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, zlib.error) as error:
        raise ShardError(f"does not decode: {error}") from None
