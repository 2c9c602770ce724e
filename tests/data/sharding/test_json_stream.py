"""Elements equal the standard library's for any chunks; memory depends on one element; every cut raises."""

import hashlib
import io
import json
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sharding import json_stream
from pipeline.data.sharding.json_stream import JsonLists

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
DOCUMENTS = st.dictionaries(st.sampled_from(["images", "annotations", "info", "other", ""]), VALUES)


def read(data: bytes, chunk: int = 4) -> tuple[list[tuple[str, Any]], JsonLists]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "READ_BYTES", chunk)
        lists = JsonLists(io.BytesIO(data), ("images", "annotations"), lambda size: None)
        return list(lists), lists


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_json_lists_elements_equal_standard_library(
    document: dict[str, Any], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    data = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        data.decode()
    except UnicodeDecodeError:  # half a surrogate pair, which no file in UTF-8 can hold
        with pytest.raises(ValueError, match="utf-8"):
            read(data, chunk)
        return
    wanted = {key: document[key] for key in document if key in ("images", "annotations")}
    elements = [(key, element) for key, value in wanted.items() if isinstance(value, list) for element in value]
    found, lists = read(data, chunk)
    assert found == elements
    assert lists.found == {key for key, value in wanted.items() if isinstance(value, list)}
    assert lists.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_json_lists_any_cut_or_trailing_text_raises(chunk: int) -> None:
    data = '{"info": {"a": [1, 2]}, "images": [{"id": 10}, {"né": "x\\u00e9"}], "annotations": [12, true]} '.encode()
    assert len(read(data, chunk)[0]) == 4
    for cut in range(len(data) - 1):
        with pytest.raises(ValueError, match=r"."):
            read(data[:cut], chunk)
    for more in (b"]", b"{}", b"1"):
        with pytest.raises(ValueError, match=rf" {len(data.decode())}$"):
            read(data + more, chunk)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"\{.*\[.* 0$"),
        ('{"images": [1, 2,]}', " 17$"),
        ('{"images": [1 2]}', r", or \].* 2 .* 14$"),
        ('{"images": [], "images": []}', "images"),
        ('{"images": [],}', "comma.* 14$"),
        ("{1: 2}", "key.* 2$"),
        ('{"images": [{"a" 1}]}', "':'.* 17$"),
    ],
)
def test_json_lists_fault_names_position(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(text.encode())


def test_json_lists_nan_and_infinity_are_read() -> None:
    ((_, number), (_, largest)) = read(b'{"images": [NaN, Infinity]}')[0]
    assert math.isnan(number)
    assert math.isinf(largest)


def test_json_lists_byte_order_mark_is_skipped() -> None:
    assert read(b"\xef\xbb\xbf" + b'{"images": [3]}')[0] == [("images", 3)]


def test_json_lists_memory_depends_on_one_element() -> None:
    element = json.dumps({"id": 1, "segmentation": [[0.5] * 100]})
    many = ", ".join([element] * 20_000)
    data = f'{{"annotations": [{many}, {{"id": oops}}, {many}]}}'.encode()
    assert len(data) > 20e6
    counted = []

    def exhaust() -> None:
        for position, _ in enumerate(JsonLists(io.BytesIO(data), ("annotations",), lambda size: None), 1):
            counted[:] = [position]

    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf" {data.index(b'oops'):,}$"):
            exhaust()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counted == [20_000]
    assert peak < 5 * json_stream.READ_BYTES
