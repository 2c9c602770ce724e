"""Images in WebP, BMP and TIFF as PNG: the same pixels, the EXIF orientation kept, anything else refused."""

import io

import numpy as np
import pytest
from PIL import Image
from support.data import noise_image, with_orientation

from pipeline.data.images import MAX_PIXELS, decode, read_orientation
from pipeline.data.sharding.converted import other_format, to_png
from pipeline.errors import ShardError

IMAGE = noise_image((20, 30), 1)
DEEP = np.linspace(0, 65535, 600, dtype=np.uint16).reshape(20, 30)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "options"), [("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_to_png_keeps_the_pixels(kind: str, options: dict[str, object], mode: str) -> None:
    image = IMAGE.convert(mode)
    data = encode(image, kind, **options)
    assert other_format(data) == kind
    assert np.array_equal(np.asarray(decode(to_png(data))), np.asarray(image.convert("RGB")))
    assert to_png(data) == to_png(data)


@pytest.mark.parametrize("order", ["<", ">"])
def test_to_png_keeps_16_bits(order: str) -> None:
    image = Image.fromarray(DEEP) if order == "<" else Image.frombytes("I;16B", (30, 20), DEEP.byteswap().tobytes())
    found = Image.open(io.BytesIO(to_png(encode(image, "TIFF"))))
    assert np.array_equal(np.asarray(found), DEEP)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["TIFF", "WEBP"])
def test_to_png_keeps_stored_pixels_and_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    png = to_png(encode(IMAGE, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    assert read_orientation(png) == orientation
    assert np.array_equal(np.asarray(decode(png)), np.asarray(IMAGE))


def test_other_format_is_none_for_what_shards_hold() -> None:
    assert other_format(with_orientation(IMAGE, 6)) is None
    assert other_format(encode(IMAGE, "PNG")) is None
    assert other_format(encode(IMAGE, "GIF")) is None
    assert other_format(b"") is None


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
        encode(IMAGE, "TIFF", save_all=True, append_images=[IMAGE]),
        encode(IMAGE, "WEBP", save_all=True, append_images=[IMAGE.rotate(90)]),
        encode(IMAGE, "TIFF")[:200],
        encode(IMAGE, "BMP")[:100],
        encode(IMAGE, "WEBP")[:60],
        encode(Image.new("1", (MAX_PIXELS // 8000, 8001)), "TIFF"),
    ],
    ids=["float", "pages", "frames", "short TIFF", "short BMP", "short WebP", "large"],
)
def test_to_png_other_file_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError):
        to_png(data)
