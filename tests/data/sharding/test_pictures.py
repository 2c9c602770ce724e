"""A picture is read only from its position; no more than the stated size is read or inflated."""

import pickle
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.sharding.pictures import Picture, read_picture
from pipeline.data.sharding.rules import Findings
from pipeline.data.sharding.sources import find_pictures
from pipeline.errors import ShardError

DATA = bytes(range(256)) * 40


def zipped(path: Path, kind: int = zipfile.ZIP_DEFLATED, data: bytes = DATA) -> Picture:
    with zipfile.ZipFile(path, "w", kind) as packed:
        packed.writestr("first.txt", "x")
        packed.writestr("a.jpg", data)
    return find_pictures(str(path), ["a.jpg"], Findings())["a.jpg"]


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_read_picture_whole_or_beginning(tmp_path: Path, kind: int) -> None:
    (tmp_path / "a.jpg").write_bytes(DATA)
    for picture in (Picture(str(tmp_path / "a.jpg"), len(DATA), 0), zipped(tmp_path / "x.zip", kind)):
        assert read_picture(pickle.loads(pickle.dumps(picture))) == DATA
        for count in (1, 300, len(DATA), 10 * len(DATA)):
            head = read_picture(picture, count)
            assert DATA.startswith(head[:count])
            assert len(head) >= min(count, 256)


def test_read_picture_range_of_file(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"before" + DATA + b"after")
    assert read_picture(Picture(str(tmp_path / "x.tar"), len(DATA), 0, offset=6)) == DATA


def test_read_picture_missing_or_shorter_file_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture = Picture(str(path), 10, 0)
    with pytest.raises(ShardError, match=r"No such file.*a\.jpg"):
        read_picture(picture)
    path.write_bytes(b"12345")
    with pytest.raises(ShardError, match=r"5 bytes .*10"):
        read_picture(picture)


def test_read_picture_zip_bomb_is_not_inflated(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "x.zip", data=bytes(60 * 2**20))
    assert bomb.packed is not None
    assert bomb.packed < 2**20
    lying = replace(bomb, length=1000)  # what a forged directory would say
    tracemalloc.start()
    try:
        with pytest.raises(ShardError, match=r"1,001 bytes .*1,000"):
            read_picture(lying)
        assert len(read_picture(bomb, 500)) <= 501
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_read_picture_damaged_zip_raises(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "x.zip"
    picture = zipped(path, kind)
    good = path.read_bytes()
    start = good.index(b"a.jpg") + 5
    for at, message in ((picture.offset, "no header where the directory"), (start + 20, r"checksum|damaged|bytes")):
        data = bytearray(good)
        data[at] ^= 255
        path.write_bytes(data)
        with pytest.raises(ShardError, match=message):
            read_picture(picture)
    path.write_bytes(good[: picture.offset + 10])
    with pytest.raises(ShardError, match="no header"):
        read_picture(picture)


def test_read_picture_wrong_checksum_raises(tmp_path: Path) -> None:
    picture = zipped(tmp_path / "x.zip", zipfile.ZIP_STORED)
    assert picture.stamp == zlib.crc32(DATA)
    with pytest.raises(ShardError, match="does not have the checksum"):
        read_picture(replace(picture, stamp=1))
