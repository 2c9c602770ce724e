"""More than 8 bits become 8 by one rule for every file format and every reader."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image
from support.data import write_coco
from support.paths import SHARED

from pipeline.data.dataset import DetectionDataset
from pipeline.data.images import check_decodes, decode, deep_range, has_alpha, to_rgb
from pipeline.data.sharding.lint import examine
from pipeline.data.sharding.rules import Rule
from pipeline.data.sharding.shards import build_shards
from pipeline.data.values import to_8_bits
from pipeline.inference.predictor import read_image

CASE = SHARED / "cases" / "png16"
NAN, INF = float("nan"), float("inf")


def png16(values: NDArray[Any]) -> bytes:
    """A 16-bit PNG of values [h, w, channels]: 1 grey, 2 with alpha, 3 colours, 4 with alpha."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (np.uint16, [0, 255, 256, 32768, 65535], [0, 0, 1, 128, 255]),
        (np.uint16, [7, 4096], [0, 16]),  # above a sixteenth: by the type
        (np.uint16, [0, 819, 4095], [0, 51, 255]),  # a 12-bit scan
        (np.uint16, [100, 110], [0, 255]),
        (np.uint16, [0, 0], [0, 0]),
        (np.uint16, [300, 300], [1, 1]),  # one value has no range of its own
        (np.int32, [0, 256, 65535], [0, 1, 255]),  # as 16 bits
        (np.int32, [-100, 0, 100], [0, 128, 255]),
        (np.int32, [0, 10**6, 2 * 10**6], [0, 128, 255]),
        (np.int32, [2 * 10**6, 2 * 10**6], [255, 255]),
        (np.float32, [0, 0.5, 1], [0, 128, 255]),
        (np.float32, [0.2, 0.4], [51, 102]),
        (np.float32, [0, 0.01, 0.02], [0, 128, 255]),
        (np.float32, [0, 51, 255], [0, 51, 255]),
        (np.float32, [NAN, 0, 1], [0, 0, 255]),
        (np.float32, [-INF, 0, 51, 255, INF], [0, 0, 51, 255, 255]),
        (np.float32, [NAN, NAN], [0, 0]),
    ],
)
def test_to_rgb_of_deep_values_follows_the_rule(kind: type, values: list[float], expected: list[int]) -> None:
    image = to_rgb(Image.fromarray(np.array([values], kind)))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[0], np.array(expected)[:, None].repeat(3, axis=1))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_to_rgb_of_every_8_bit_mode(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 4))).mode == "RGB"


@pytest.mark.parametrize("most", [4095, 4096, 65535])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_decode_of_16_bit_png_follows_the_rule(channels: int, most: int) -> None:
    values = np.random.default_rng(channels).integers(0, most + 1, (6, 5, channels)).astype(np.uint16)
    values[0, 0] = most
    values[0, 1, 0] = 0
    data = png16(values)
    check_decodes(data, (6, 5))
    colours = values[..., :3] if channels > 2 else values[..., :1].repeat(3, axis=2)
    np.testing.assert_array_equal(np.asarray(decode(data)), to_8_bits(colours, 65535.0))
    assert (np.asarray(decode(data)).max() > 250) == (most != 4096), "a 12-bit scan is not black"
    assert deep_range(data) == (0.0, float(most), most == 4095)
    assert has_alpha(Image.open(io.BytesIO(data))) == (channels in (2, 4))


def test_decode_of_8_bits_is_never_scaled() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[1, 2, 9]], np.uint8)).save(buffer, "PNG")
    assert np.asarray(decode(buffer.getvalue()))[0, :, 0].tolist() == [1, 2, 9]
    assert deep_range(buffer.getvalue()) is None


@settings(deadline=None)
@given(arrays.arrays(st.sampled_from([np.uint16, np.int32, np.float32]), (3, 4)), st.sampled_from([1.0, 65535.0]))
def test_to_8_bits_keeps_the_order_of_values(values: NDArray[Any], top: float) -> None:
    scaled = to_8_bits(values, top).ravel()[np.argsort(values, axis=None, kind="stable")]
    known = ~np.isnan(np.sort(values, axis=None).astype(float))
    assert (np.diff(scaled[known].astype(int)) >= 0).all()


@settings(deadline=None)
@given(arrays.arrays(np.uint16, (2, 3), elements=st.integers(0, 65535)))
def test_to_rgb_same_values_in_any_file_format_agree(values: NDArray[np.uint16]) -> None:
    expected = np.asarray(to_rgb(Image.fromarray(values)))
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(values.astype(np.int32)))), expected)
    for channels in (1, 3):
        data = png16(values[..., None].repeat(channels, axis=2))
        np.testing.assert_array_equal(np.asarray(decode(data)), expected)
        np.testing.assert_array_equal(np.asarray(read_image(data)), expected)


def test_12_bit_scan_is_equal_in_training_lint_and_prediction(tmp_path: Path) -> None:
    annotations, folder = write_coco(tmp_path, images=2)
    values = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64, 1)
    (folder / "some_3.jpg").write_bytes(png16(values))
    (folder / "some_10.jpg").write_bytes(png16(np.full((64, 48, 4), 60000, np.uint16)))
    seen = {rule: examples for rule, _, examples in examine(annotations, str(folder), decode=True).findings}
    assert seen[Rule.DARK_IMAGE] == ["some_3.jpg (0 to 3071)"]
    assert seen[Rule.DEEP_IMAGE] == ["some_10.jpg (60000 to 60000)"]
    assert seen[Rule.ALPHA] == ["some_10.jpg"]
    data = DetectionDataset(build_shards(annotations, folder, tmp_path / "out").folder)
    trained = np.asarray(data.sample(0).image)
    np.testing.assert_array_equal(trained, np.asarray(read_image(folder / "some_3.jpg")))
    np.testing.assert_array_equal(trained, np.asarray(read_image(Image.open(folder / "some_3.jpg"))))
    np.testing.assert_array_equal(trained[..., 0], np.rint(values[..., 0] / 3071 * 255))


@pytest.mark.skipif(not CASE.is_dir(), reason=f"{CASE} is not there")
def test_shared_ramp_is_not_clipped(tmp_path: Path) -> None:
    index = build_shards(CASE / "a.json", CASE / "images", tmp_path / "out")
    pixels = np.asarray(DetectionDataset(index.folder).sample(0).image)
    assert (pixels == 255).mean() < 0.03
    assert np.unique(pixels).size > 40
