"""The cache in one process: what it reads, keeps and removes, and its errors."""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cache import SIZE, content, names, never, shard, source, tars

from pipeline.data import cache as module
from pipeline.data.cache import CacheFullError, ShardCache
from pipeline.data.index import ShardInfo
from pipeline.errors import ShardError


def test_read_second_time_downloads_nothing(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10 * SIZE)
    assert cache.read(shard(1), 10, 5, source(1)) == content(1)[10:15]
    assert cache.read(shard(1), 0, SIZE, never) == content(1)
    assert cache.read(shard(1), SIZE - 2, 9, never) == content(1)[-2:], "the caller compares lengths"
    assert names(tmp_path / "cache", ".part") == set()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_read_equal_names_of_two_splits_are_two_shards(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    one, two = shard(1), ShardInfo(shard(1).name, SIZE, shard(2).sha256, 1)
    assert cache.read(one, 0, 1, source(1)) + cache.read(two, 0, 1, source(2)) == b"\1\2"


def test_make_room_least_recently_read_is_removed(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 3 * SIZE)
    for number in (1, 2, 3, 1):
        time.sleep(0.01)  # file times
        cache.read(shard(number), 0, 1, source(number))
    cache.read(shard(4), 0, 1, source(4))
    assert names(tmp_path) == tars(1, 3, 4)
    cache.read(shard(5), 0, 1, source(5))
    assert names(tmp_path) == tars(1, 4, 5)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 3 * SIZE


def test_make_room_released_shard_is_removed_first(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 3 * SIZE)
    for number in (1, 2, 3):
        cache.read(shard(number), 0, 1, source(number))
    cache.release(shard(3))
    cache.release(shard(2))
    cache.release(shard(9))
    cache.read(shard(2), 0, 1, never)  # another process needs it still
    cache.read(shard(4), 0, 1, source(4))
    assert names(tmp_path) == tars(1, 2, 4)


def test_make_room_shard_in_use_stays(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 2 * SIZE)
    for number in (1, 2):
        cache.read(shard(number), 0, 1, source(number))
        time.sleep(0.01)
    with (tmp_path / f"{shard(1).sha256}.tar").open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        cache.read(shard(3), 0, 1, source(3))
        assert names(tmp_path) == tars(1, 3)
    cache.read(shard(4), 0, 1, source(4))
    assert names(tmp_path) == tars(3, 4)


def test_read_full_cache_raises_after_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(str(tmp_path), SIZE)
    cache.read(shard(1), 0, 1, source(1))
    monkeypatch.setattr(module, "FULL_CACHE_SECONDS", 0.3)
    with (tmp_path / f"{shard(1).sha256}.tar").open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        with pytest.raises(CacheFullError):
            cache.fetch(shard(2), source(2))
        with pytest.raises(ShardError, match=r"s-000002\.tar .*data\.cache_gib"):
            cache.read(shard(2), 0, 1, source(2))


def test_read_shard_above_limit_raises(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"s-000001\.tar .*data\.cache_gib"):
        ShardCache(str(tmp_path), SIZE - 1).read(shard(1), 0, 1, source(1))


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data[:-1] + b"x"])
def test_fetch_damaged_copy_is_not_kept(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)

    def download(target: Path, check: Callable[[], None]) -> None:
        target.write_bytes(spoil(content(1)))
        check()

    with pytest.raises(ValueError, match="the index"):  # `Store.download` tries again, then names the file
        cache.read(shard(1), 0, 1, download)
    assert names(tmp_path) == names(tmp_path, ".part") == set()
    assert cache.read(shard(1), 0, 1, source(1)) == b"\1"


def test_read_truncated_file_is_downloaded_again(tmp_path: Path) -> None:
    """A machine that lost power may have renamed a file whose bytes never reached the disk."""
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    cache.read(shard(1), 0, 1, source(1))
    os.truncate(tmp_path / f"{shard(1).sha256}.tar", 10)
    assert cache.read(shard(1), 500, 1, source(1)) == b"\1"


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_read_without_permission_names_shard_and_setting(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    cache.read(shard(1), 0, 1, source(1))
    (tmp_path / f"{shard(1).sha256}.tar").chmod(0)
    with pytest.raises(ShardError, match=r"s-000001\.tar .*Permission denied.*data\.cache_dir"):
        cache.read(shard(1), 0, 1, never)


def test_read_disk_error_names_shard_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    cache.read(shard(1), 0, 1, source(1))

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module.os, "pread", broken)
    with pytest.raises(ShardError, match=r"s-000001\.tar .*Input/output error.*data\.cache_dir"):
        cache.read(shard(1), 0, 1, never)
