"""Every form in which an image reaches the registered model gives the same pixels; the rest names its row."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image
from support.data import with_orientation
from support.helpers import write_image

from pipeline.errors import InputError
from pipeline.inference.request import read_rows

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def png(pixels: Any = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
TEXT = base64.b64encode(PNG).decode()
ONE: dict[str, Any] = {
    "bytes": PNG,
    "bytearray": bytearray(PNG),
    "memoryview": memoryview(PNG),
    "numpy bytes": np.bytes_(PNG),
    "base64": TEXT,
    "base64 as bytes": TEXT.encode(),
    "base64 as numpy string": np.str_(TEXT),
    "wrapped": base64.encodebytes(PNG).decode(),
    "wrapped as bytes": base64.encodebytes(PNG),
    "windows lines": base64.encodebytes(PNG).decode().replace("\n", "\r\n"),
    "without padding": TEXT.rstrip("="),
    "url-safe": base64.urlsafe_b64encode(PNG).decode(),
    "data URL": f"data:image/png;base64,{TEXT}",
    "data URL as bytes": f"data:image/png;base64,{TEXT}".encode(),
    "data URL with a parameter": f"DATA:image/png;charset=utf-8;base64,{TEXT}",
    "quoted data URL": f"data:image/png;base64,{TEXT.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
    "Pillow": Image.fromarray(PIXELS),
    "array": PIXELS,
    "array of another integer": PIXELS.astype(np.int64),
    "nested list": PIXELS.tolist(),
    "wrapped scalar": np.array(TEXT),
}
FORMS: dict[str, Callable[[Any], Any]] = {
    "list": lambda value: [value],
    "tuple": lambda value: (value,),
    "frame": lambda value: pandas.DataFrame({"any": [value]}),
    "frame with other columns": lambda value: pandas.DataFrame({"id": [7], "image": [value]}),
    "series": lambda value: pandas.Series([value]),
    "dict": lambda value: {"image": [value]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ONE)
def test_read_rows_any_kind_in_any_form_gives_the_pixels(kind: str, form: str) -> None:
    (found,) = read_rows(FORMS[form](ONE[kind]), "apply", False)
    assert found.mode == "RGB"
    assert np.array_equal(found, PIXELS)


@pytest.mark.parametrize("kind", [kind for kind in ONE if kind != "nested list"])
def test_read_rows_single_image_is_one_row(kind: str) -> None:
    (found,) = read_rows(ONE[kind], "apply", False)
    assert np.array_equal(found, PIXELS)


@pytest.mark.parametrize(
    "several",
    [
        np.array([TEXT, TEXT]),  # what a server makes of `inputs` and `instances`
        np.array([TEXT.encode(), TEXT.encode()]),
        np.array([[TEXT], [TEXT]]),
        np.array([PIXELS, PIXELS]),
        {"image": np.array([TEXT, TEXT])},
        [PIXELS, TEXT],
    ],
)
def test_read_rows_several_images_keep_their_order(several: Any) -> None:
    found = list(read_rows(several, "apply", False))
    assert len(found) == 2
    assert all(np.array_equal(each, PIXELS) for each in found)
    assert list(read_rows([], "apply", False)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            None,
            float("nan"),
            5,
            True,
            "",
            b"",
            "text",
            b"text",
            {"a": 1},
            "data:image/png,text",
            TEXT[: len(TEXT) // 2],
        ),
        *(
            PNG[:40],
            PIXELS[..., 0],
            PIXELS[..., :2],
            PIXELS[:0],
            PIXELS / 255.0,
            PIXELS.astype(int) - 1,
            [],
            [[1], [1, 2]],
        ),
        Path("a.jpg"),
    ],
)
def test_read_rows_what_is_no_image_names_its_row(wrong: Any) -> None:
    rows = read_rows([PNG, wrong], "apply", False)
    assert np.array_equal(next(rows), PIXELS)
    with pytest.raises(InputError, match="row 1:"):
        next(rows)


def test_read_rows_orientation_is_applied_or_ignored() -> None:
    file = with_orientation(Image.fromarray(PIXELS), 6, "PNG")
    for value in (file, base64.b64encode(file).decode(), Image.open(io.BytesIO(file))):
        (shown,) = read_rows([value], "apply", False)
        (stored,) = read_rows([value], "ignore", False)
        assert np.array_equal(shown, np.rot90(PIXELS, -1))
        assert np.array_equal(stored, PIXELS)


def test_read_rows_columns_without_a_name_to_choose_by_are_refused() -> None:
    for value in (pandas.DataFrame({"a": [PNG], "b": [PNG]}), {}, {"a": [PNG], "b": [PNG]}):
        with pytest.raises(InputError, match="image"):
            read_rows(value, "apply", False)


def test_read_rows_paths_only_where_they_are_allowed(tmp_path: Path) -> None:
    path = str(write_image(tmp_path / "a.png", (9, 6)))
    (found,) = read_rows([path], "apply", True)
    assert found.size == (9, 6)
    (found,) = read_rows([TEXT], "apply", True)
    assert found.size == (9, 6)
    for allowed, source in ((False, path), (True, str(tmp_path / "absent.png"))):
        with pytest.raises(InputError, match="row 0"):
            list(read_rows([source], "apply", allowed))
