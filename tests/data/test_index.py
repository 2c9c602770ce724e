"""The index identifies the data set, can be read back, and every damage raises."""

import hashlib
import io
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from support.data import edit, write_shards

from pipeline.data.index import INDEX, ROW, SAMPLES, Category, load_index
from pipeline.errors import ShardError


def test_load_index_equals_written(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    assert len(index) == 12
    assert [shard.samples for shard in index.shards] == [5, 5, 2]
    assert index.categories == (Category(1, "person"), Category(13, "sign"), Category(90, "kite"))
    assert index.category_ids == (1, 13, 90)
    assert index.samples.image_id.tolist() == [3 + 7 * i for i in range(12)]
    assert index.samples.image_id.dtype == np.int64
    assert index.samples.boxes.tolist() == [2, 2, 2, 0, *[2] * 8]
    assert index.samples.crowds.tolist() == [1, 1, 1, 0, *[1] * 8]
    assert index.samples.png.tolist() == [0, 0, 1, *[0] * 9]
    assert index.sizes()[:2].tolist() == [[48, 64], [64, 48]]


def test_category_names_of_the_same_letters_are_equal() -> None:
    composed, decomposed = (Category(1, unicodedata.normalize(form, "größe")) for form in ("NFC", "NFD"))
    assert composed.name != decomposed.name
    assert composed == decomposed
    assert len({composed, decomposed}) == 1
    assert composed not in (Category(2, composed.name), Category(1, "grosse"), ("größe",))


def test_labels_contiguous_and_raw(tmp_path: Path) -> None:
    index = write_shards(tmp_path, images=1)
    assert index.labels("contiguous") == {1: 0, 13: 1, 90: 2}
    assert index.labels("raw") == {1: 1, 13: 13, 90: 90}


def test_dataset_digest_depends_on_content_only(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "a")
    assert write_shards(tmp_path / "b").digest == index.digest
    assert write_shards(tmp_path / "c", samples_per_shard=4).digest != index.digest
    assert write_shards(tmp_path / "d", images=11).digest != index.digest


def test_load_index_url_equals_folder(tmp_path: Path) -> None:
    import fsspec

    index = write_shards(tmp_path)
    fsspec.filesystem("memory").put(f"{index.folder}/", "/index-test/", recursive=True)
    assert load_index("memory://index-test").digest == index.digest


def test_load_index_of_a_folder_of_splits_names_them(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / INDEX).write_text("{}")
    with pytest.raises(ShardError, match=re.escape(f"name one: {tmp_path}/val")):
        load_index(tmp_path)


def test_load_index_missing_folder_or_index_raises(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"nowhere.*jobs\.shard build DATASET OUT.*ANNOTATIONS IMAGES OUT"):
        load_index(str(tmp_path / "nowhere"))
    folder = Path(write_shards(tmp_path).folder)
    (folder / INDEX).unlink()
    with pytest.raises(ShardError, match=rf"{folder} .*{INDEX}.*jobs\.shard build"):
        load_index(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3.*1 and 2"),
        ({"format": "other"}, r"jobs\.shard build"),
        ({"digest": "0" * 64}, INDEX),
        ({"categories": []}, INDEX),
        ({"shards": []}, INDEX),
        ({"shards": 3}, "TypeError"),
        ({"samples_file": {}}, "sha256"),
        ({"samples_file": {"sha256": "0"}}, SAMPLES),
    ],
)
def test_load_index_damaged_or_other_version_raises(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = Path(write_shards(tmp_path).folder)
    edit(folder / INDEX, change)
    with pytest.raises(ShardError, match=message):
        load_index(str(folder))


@pytest.mark.parametrize("name", ["../x.tar", "/abs/x.tar", "pipe:cat x.tar", ".x.tar", "a/b.tar", "x.tgz", "x.tar\n"])
def test_load_index_shard_name_outside_folder_raises(tmp_path: Path, name: str) -> None:
    folder = Path(write_shards(tmp_path).folder)
    shards = json.loads((folder / INDEX).read_text())["shards"]
    edit(folder / INDEX, {"shards": [{**shards[0], "name": name}, *shards[1:]]})
    with pytest.raises(ShardError, match=re.escape(repr(name))):
        load_index(str(folder))


def test_load_index_pickled_sidecar_is_not_loaded(tmp_path: Path) -> None:
    folder = Path(write_shards(tmp_path).folder)
    np.save(folder / SAMPLES, np.array([{"evil": 1}], object), allow_pickle=True)
    table = (folder / SAMPLES).read_bytes()
    edit(folder / INDEX, {"samples_file": {"sha256": hashlib.sha256(table).hexdigest()}})
    with pytest.raises(ShardError, match=INDEX):
        load_index(str(folder))


def saved(rows: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def seal_rows(folder: Path, table: bytes) -> None:
    """Replace the sidecar and update the index, as an attacker would."""
    (folder / SAMPLES).write_bytes(table)
    edit(folder / INDEX, {"samples_file": {"sha256": hashlib.sha256(table).hexdigest()}})


def test_load_index_other_sidecar_raises(tmp_path: Path) -> None:
    folder = Path(write_shards(tmp_path).folder)
    rows = np.load(folder / SAMPLES)
    assert rows.dtype == ROW
    good = (folder / SAMPLES).read_bytes()
    others = [rows[:5], rows.astype([(name, "<i8") for name in rows.dtype.names]), rows.view(np.uint8), rows["offset"]]
    for table in (b"", good[:-1], good[200:], *map(saved, others)):
        seal_rows(folder, table)
        with pytest.raises(ShardError, match=INDEX):
            load_index(str(folder))
    seal_rows(folder, good)
    for count in (-1, 10**13, "x", None):
        edit(folder / INDEX, {"samples": count})
        with pytest.raises(ShardError, match=INDEX):
            load_index(str(folder))


@pytest.mark.parametrize(("field", "value"), [("shard", 2**31 - 1), ("shard", -1), ("width", -5), ("offset", -512)])
def test_load_index_impossible_rows_raise(tmp_path: Path, field: str, value: int) -> None:
    folder = Path(write_shards(tmp_path).folder)
    rows = np.load(folder / SAMPLES)
    rows[field][3] = value
    seal_rows(folder, saved(rows))
    with pytest.raises(ShardError, match=INDEX):
        load_index(str(folder))


@pytest.mark.parametrize("order", [[1, 0], [0, 0]])
def test_load_index_unsorted_or_duplicate_images_raise(tmp_path: Path, order: list[int]) -> None:
    folder = Path(write_shards(tmp_path).folder)
    rows = np.load(folder / SAMPLES)
    rows[:2] = rows[order]
    seal_rows(folder, saved(rows))
    with pytest.raises(ShardError, match=INDEX):
        load_index(str(folder))


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_load_index_other_json_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ShardError, match=INDEX):
        load_index(str(tmp_path))
