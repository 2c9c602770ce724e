"""Converts images in WebP, BMP and TIFF to PNG: shards hold only JPEG and PNG, whose bytes stay as they came.

An image without an exact PNG (floating point) and a file of several images (pages, frames) are ShardErrors without
the image's name. The PNG has the pixels as stored and the EXIF orientation, as a JPEG would. The same Pillow writes
the same bytes.
"""

import io
import struct
import warnings
import zlib

from PIL import Image

from pipeline.data.images import MAX_BYTES, MAX_PIXELS, ORIENTATION, UPRIGHT, turn_upright
from pipeline.data.sharding.image_files import ImageFile, read_image_file
from pipeline.errors import ShardError

MAGIC = {b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
INVERSE = {6: 8, 8: 6}  # the other orientations are their own inverse


def other_format(data: bytes) -> str | None:
    """`BMP`, `TIFF` or `WEBP`, from the first 12 bytes; None for everything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in MAGIC.items() if data.startswith(magic)), None)


def read_stored(file: ImageFile) -> bytes:
    """The bytes that a shard holds: those of `read_image_file`, or their PNG. Raises ShardError."""
    data = read_image_file(file)
    return data if file.as_png is None else to_png(data)


def to_png(data: bytes) -> bytes:
    """The image as PNG. Raises ShardError if it is broken or too large, or not one image that PNG can hold."""
    kind = other_format(data)
    assert kind is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken metadata says nothing
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=(kind,))
            if image.width * image.height > MAX_PIXELS:
                raise ShardError(f"has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; scale it down")
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise ShardError(f"holds {frames} images ({kind}); save the one to use as a file of its own")
            orientation = int(image.getexif().get(ORIENTATION, 1))
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ShardError(f"has more than {MAX_PIXELS:,} pixels; scale it down") from None
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, EOFError, struct.error, zlib.error) as error:
        raise ShardError(f"does not decode as {kind}: {error}") from None
    if image.mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    elif image.mode in ("I;16B", "I;16L", "I;16N"):
        image = image.convert("I").convert("I;16")
    elif image.mode == "RGBX":
        image = image.convert("RGB")
    if image.mode not in PNG_MODES:
        raise ShardError(f"has pixels of a kind that PNG does not hold ({kind}, {image.mode}); convert it")
    if kind == "TIFF" and orientation in UPRIGHT:  # Pillow has turned it upright
        image = turn_upright(image, INVERSE.get(orientation, orientation))
    exif = Image.Exif()
    if orientation in UPRIGHT:
        exif[ORIENTATION] = orientation
    image.info = {key: image.info[key] for key in ("transparency",) if key in image.info}
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    if buffer.tell() > MAX_BYTES:
        raise ShardError(f"has {buffer.tell():,} bytes as PNG, over the cap {MAX_BYTES:,}; re-encode it")
    return buffer.getvalue()
