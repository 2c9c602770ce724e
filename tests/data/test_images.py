"""Images are opened by content, checked before decoding, and refused with a reason."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.data import noise_image, with_orientation

from pipeline.data import images
from pipeline.data.images import (
    check_decodes,
    decode,
    decode_at_least,
    extension,
    open_image,
    read_orientation,
    turn_upright,
)
from pipeline.errors import ShardError

SIZE = (40, 60)


def encoded(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = SIZE) -> bytes:
    buffer = io.BytesIO()
    noise_image(size, 1).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1")],
)
def test_to_rgb_every_mode_gives_rgb(kind: str, mode: str) -> None:
    data = encoded(kind, mode)
    check_decodes(data, SIZE)
    image = decode(data, SIZE)
    assert (image.mode, image.size) == ("RGB", (60, 40))


def test_to_rgb_palette_with_transparency_does_not_warn() -> None:
    buffer = io.BytesIO()
    noise_image(SIZE, 1).convert("P").save(buffer, "PNG", transparency=bytes([0, 255]))
    assert decode(buffer.getvalue(), SIZE).mode == "RGB"


def test_decode_keeps_stored_orientation() -> None:
    assert decode(with_orientation(noise_image(SIZE, 1), 6), SIZE).size == (60, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turn_upright_gives_displayed_image(kind: str, orientation: int) -> None:
    data = with_orientation(noise_image(SIZE, 1), orientation, kind)
    assert read_orientation(data) == orientation
    image = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(turn_upright(image, read_orientation(image)), ImageOps.exif_transpose(image))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_read_orientation_unknown_value_gives_1(orientation: int) -> None:
    assert read_orientation(with_orientation(noise_image(SIZE, 1), orientation)) == 1


@settings(deadline=None)
@given(st.sampled_from([b"", b"Exif\0\0", b"Exif\0\0II*\0", b"MM\0*\0\0\0\x08\0\x01\x01\x12"]), st.binary(max_size=64))
def test_read_orientation_any_bytes_do_not_raise(head: bytes, rest: bytes) -> None:
    image = Image.new("L", (4, 5))
    image.info["exif"] = head + rest
    assert read_orientation(image) in range(1, 9)


@pytest.mark.parametrize("data", [b"", b"GIF89a....", encoded("BMP"), encoded("TIFF"), b"\x80\x04\x95"])
def test_extension_other_format_raises(data: bytes) -> None:
    with pytest.raises(ShardError, match=r"JPEG.*PNG"):
        extension(data)


def test_open_image_another_size_raises() -> None:
    with pytest.raises(ShardError, match=r"60 x 40 .*40 x 60"):
        open_image(encoded(), (60, 40))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.6, 0.95])
def test_check_decodes_truncated_body_raises(kind: str, share: float) -> None:
    data = encoded(kind, size=(200, 300))
    cut = data[: int(len(data) * share)]
    for function in (check_decodes, decode):
        with pytest.raises(ShardError, match="decode"):
            function(cut, (200, 300))


def test_open_image_broken_header_raises() -> None:
    with pytest.raises(ShardError, match="jpg"):
        open_image(b"\xff\xd8\xff" + bytes(50), SIZE)


def test_decode_jpeg_without_pixels_raises() -> None:
    data = encoded()
    data = data[: data.index(b"\xff\xda")] + b"\xff\xd9"  # its scan is gone, its header is whole
    with pytest.raises(ShardError, match="decode"):
        decode_at_least(data, SIZE, (4, 4))


@pytest.mark.parametrize("side", [12_000, 60_000])  # Pillow itself would warn at the first, refuse at the second
def test_open_image_pixel_bomb_raises(side: int) -> None:
    header = bytearray(encoded("PNG", "1"))
    header[16:24] = side.to_bytes(4, "big") * 2
    import zlib

    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(ShardError, match=f"{images.MAX_PIXELS:,}"):
        open_image(bytes(header), (side, side))


def test_open_image_above_max_pixels_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ShardError, match=r"60 x 40.*100"):
        decode(encoded(), SIZE)


def test_decode_jpeg_agrees_with_torchvision() -> None:
    data = encoded("JPEG", "L")
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(data, SIZE)), reference)
