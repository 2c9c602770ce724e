"""The folder of the cache: files of others stay, and a folder that is not a cache is refused."""

import os
import re
from pathlib import Path

import pytest
from support.cache import FOREIGN, SIZE, content, never, shard, source

from pipeline.data import cache as module
from pipeline.data.cache import MARKER, ShardCache
from pipeline.errors import ConfigError, ShardError


def test_read_folder_below_file_names_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match=r"data\.cache_dir .*file/cache"):
        ShardCache(str(tmp_path / "file" / "cache"), 10 * SIZE).read(shard(1), 0, 1, source(1))


def test_read_folder_of_another_user_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path.stat().st_uid + 1
    monkeypatch.setattr(module.os, "getuid", lambda: other)
    (tmp_path / "cache").mkdir()
    if (tmp_path / "cache").stat().st_uid == 0:
        os.chown(tmp_path / "cache", other + 1, -1)
    with pytest.raises(ShardError, match=r"data\.cache_dir"):
        ShardCache(str(tmp_path / "cache"), 10 * SIZE).read(shard(1), 0, 1, source(1))


@pytest.mark.parametrize("name", [*FOREIGN, "shards.lock"])
def test_read_folder_with_foreign_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigError, match=re.escape(f"data.cache_dir {tmp_path} holds {name}")):
        ShardCache(str(tmp_path), 10 * SIZE).read(shard(1), 0, 1, never)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_read_folders_and_links_are_foreign(tmp_path: Path, kind: str) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    cache.mkdir()
    elsewhere.write_bytes(content(1))
    place = cache / f"{shard(1).sha256}.tar"
    place.mkdir() if kind == "folder" else place.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        ShardCache(str(cache), SIZE).read(shard(1), 0, 1, never)
    (cache / MARKER).touch()
    with pytest.raises(ShardError, match=r"data\.cache_dir"):
        ShardCache(str(cache), SIZE).read(shard(1), 0, 1, never)
    assert ShardCache(str(cache), SIZE).read(shard(2), 0, 1, source(2)) == b"\2"
    assert os.path.lexists(place)
    assert elsewhere.read_bytes() == content(1)


def test_read_cache_of_version_0_1_without_marker_is_used(tmp_path: Path) -> None:
    (tmp_path / f"{shard(1).sha256}.tar").write_bytes(content(1))
    for name in (f"{shard(1).sha256}.lock", "cache.lock", f"{shard(2).sha256}.{SIZE}.part"):
        (tmp_path / name).touch()
    cache = ShardCache(str(tmp_path), 2 * SIZE)
    assert cache.read(shard(1), 0, 1, never) == b"\1"
    assert (tmp_path / MARKER).is_file()
    (tmp_path / "mine").write_bytes(b"mine")  # in a folder that is known as a cache
    for number in (2, 3, 4):
        assert ShardCache(str(tmp_path), 2 * SIZE).read(shard(number), 0, 1, source(number)) == bytes([number])
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_default_folder_has_user_id() -> None:
    assert str(os.getuid()) in ShardCache("", 1).folder.name
