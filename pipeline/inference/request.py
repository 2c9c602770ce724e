"""The images of a request to the registered model, in every form in which MLflow passes them.

From Python these are frames, lists, arrays or single images; from a server a frame (`dataframe_split`,
`dataframe_records`), or strings and numbers in arrays (`inputs`, `instances`). All faults are InputErrors that name the
row, counted from 0.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas
from PIL import Image

from pipeline.data.images import MAGIC
from pipeline.errors import InputError
from pipeline.evaluation.drawing import Exif
from pipeline.inference.base64_text import decode_base64
from pipeline.inference.predictor import Source, read_image

COLUMN = "image"
FORMS = "an image file as bytes or base64, a Pillow image, or an array [height, width, 3] of integers 0 to 255"


def read_rows(model_input: Any, exif: Exif, allow_paths: bool) -> Iterator[Image.Image]:
    """The image of each row, read one after the other during iteration.

    Args:
        model_input: rows of images, or one image. Rows are a frame or a dict with one column, or with one called
            `image`; or a list, a series or an array.
        exif: see `predictor.read_image`.
        allow_paths: whether a string may name a file.

    Raises:
        InputError: several columns and none of them `image`; during iteration, a row that is not an image.
    """
    return _read(_rows_of(model_input), exif, allow_paths)


def _read(rows: Sequence[Any], exif: Exif, allow_paths: bool) -> Iterator[Image.Image]:
    for number, value in enumerate(rows):
        try:
            yield read_image(_source(value, allow_paths), exif)
        except InputError as error:
            raise InputError(f"row {number}: {error}") from None


def _rows_of(value: Any) -> Sequence[Any]:
    if isinstance(value, pandas.DataFrame | dict):
        columns = list(value)
        if len(columns) != 1 and COLUMN not in columns:
            raise InputError(f"columns {columns}: name the one with the images '{COLUMN}'")
        value = value[COLUMN if COLUMN in columns else columns[0]]
    if isinstance(value, pandas.Series):
        return value.tolist()
    if isinstance(value, np.ndarray):
        if value.ndim == 2 and value.shape[1] == 1:  # a column of strings, bytes or images
            return value[:, 0].tolist()
        return [value.item()] if value.ndim == 0 else [value] if value.ndim == 3 else list(value)
    return value if isinstance(value, list | tuple) else [value]


def _source(value: Any, allow_paths: bool) -> Source:
    """The value of one row as an argument of `read_image`."""
    if isinstance(value, np.ndarray) and value.ndim == 0:  # MLflow wraps the values of `instances`
        value = value.item()
    if isinstance(value, list | tuple):
        try:
            return np.array(value)
        except ValueError:  # rows of pixels of different lengths
            raise InputError(f"a list of this shape is not an image; give {FORMS}") from None
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    if isinstance(value, str):
        if allow_paths and os.path.exists(value):
            return value
        decoded = decode_base64(value)
        if decoded is None:
            if allow_paths:
                raise InputError(f"{value!r:.80} is neither a file nor base64")
            raise InputError(
                "a string must be an image file in base64; pass its bytes, or load the model with "
                "model_config={'allow_paths': True} to give paths"
            )
        return decoded
    if isinstance(value, bytes):
        if value.startswith(tuple(MAGIC)):
            return value
        return decode_base64(value.decode("ascii", "replace")) or value
    if isinstance(value, Image.Image | np.ndarray):
        return value
    raise InputError(f"{value!r:.40} is not an image; give {FORMS}")
