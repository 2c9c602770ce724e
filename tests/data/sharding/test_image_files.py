"""An image is read only from its position; no more than the stated size is read or inflated."""

import pickle
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.sharding.image_files import FileStream, ImageFile, read_image_file
from pipeline.data.sharding.rules import Findings
from pipeline.data.sharding.sources import find_image_files
from pipeline.errors import ShardError

DATA = bytes(range(256)) * 40


def zipped(path: Path, kind: int = zipfile.ZIP_DEFLATED, data: bytes = DATA) -> ImageFile:
    with zipfile.ZipFile(path, "w", kind) as packed:
        packed.writestr("first.txt", "x")
        packed.writestr("a.jpg", data)
    return find_image_files(str(path), ["a.jpg"], Findings())["a.jpg"]


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_read_image_file_whole_or_beginning(tmp_path: Path, kind: int) -> None:
    (tmp_path / "a.jpg").write_bytes(DATA)
    for file in (ImageFile(str(tmp_path / "a.jpg"), len(DATA), 0), zipped(tmp_path / "x.zip", kind)):
        assert read_image_file(pickle.loads(pickle.dumps(file))) == DATA
        for count in (1, 300, len(DATA), 10 * len(DATA)):
            head = read_image_file(file, count)
            assert DATA.startswith(head[:count])
            assert len(head) >= min(count, 256)


def test_read_image_file_range_of_file(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"before" + DATA + b"after")
    assert read_image_file(ImageFile(str(tmp_path / "x.tar"), len(DATA), 0, offset=6)) == DATA


def test_read_image_file_missing_or_shorter_file_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    file = ImageFile(str(path), 10, 0)
    with pytest.raises(ShardError, match=str(path)):
        read_image_file(file)
    path.write_bytes(b"12345")
    with pytest.raises(ShardError, match=r"\b5\b.*\b10\b"):
        read_image_file(file)


def test_read_image_file_zip_bomb_is_not_inflated(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "x.zip", data=bytes(60 * 2**20))
    assert bomb.packed is not None
    assert bomb.packed < 2**20
    lying = replace(bomb, length=1000)  # what a forged directory would say
    tracemalloc.start()
    try:
        with pytest.raises(ShardError, match=r"1,001.*1,000"):
            read_image_file(lying)
        assert len(read_image_file(bomb, 500)) <= 501
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_read_image_file_damaged_zip_raises(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "x.zip"
    file = zipped(path, kind)
    good = path.read_bytes()
    start = good.index(b"a.jpg") + 5
    for at in (file.offset, start + 20):
        data = bytearray(good)
        data[at] ^= 255
        path.write_bytes(data)
        with pytest.raises(ShardError):
            read_image_file(file)
    path.write_bytes(good[: file.offset + 10])
    with pytest.raises(ShardError, match="zip"):
        read_image_file(file)


def test_read_image_file_wrong_checksum_raises(tmp_path: Path) -> None:
    file = zipped(tmp_path / "x.zip", zipfile.ZIP_STORED)
    assert file.stamp == zlib.crc32(DATA)
    with pytest.raises(ShardError, match="checksum"):
        read_image_file(replace(file, stamp=1))


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, None])
@pytest.mark.parametrize("count", [1, 4096, 2**30])
def test_file_stream_reads_the_file_in_pieces(tmp_path: Path, kind: int | None, count: int) -> None:
    data = DATA + b"\0" * 5000
    (tmp_path / "a.jpg").write_bytes(data)
    plain = ImageFile(str(tmp_path / "a.jpg"), len(data), 0)
    stream = FileStream(plain if kind is None else zipped(tmp_path / "x.zip", kind, data))
    assert b"".join(iter(lambda: stream.read(count), b"")) == data
    stream.close()


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_file_stream_damaged_or_shorter_file_is_refused(tmp_path: Path, kind: int) -> None:
    file = zipped(tmp_path / "x.zip", kind)
    longer = FileStream(replace(file, length=file.length + 1))
    with pytest.raises(ShardError):
        longer.read(2**30)
    longer.close()
    broken = bytearray((tmp_path / "x.zip").read_bytes())
    broken[file.offset + 60] ^= 255
    (tmp_path / "x.zip").write_bytes(broken)
    damaged = FileStream(file)
    with pytest.raises(ShardError):
        damaged.read(2**30)
    damaged.close()
