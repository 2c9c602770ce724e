"""Bytes at offsets: local files with few descriptors, remote files through the cache or by range."""

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from support.data import write_shards
from support.processes import run_child
from support.store import flaky_store

from pipeline.data import reader as module
from pipeline.data.cache import ShardCache
from pipeline.data.index import ShardIndex
from pipeline.data.reader import ShardReader
from pipeline.errors import ShardError
from pipeline.files.shard_files import Store

GIB = 2**30


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("reader"), images=12, samples_per_shard=3)


def local(index: ShardIndex) -> ShardReader:
    return ShardReader(Store(index.folder))


def whole(index: ShardIndex, number: int) -> bytes:
    return (Path(index.folder) / index.shards[number].name).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_reader_bounds_open_files(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    reader = local(index)
    for turn in range(3):
        for number, shard in enumerate(index.shards):
            assert reader.read(shard, 100 * turn, 700) == whole(index, number)[100 * turn : 100 * turn + 700]
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def child(reader: ShardReader, index: ShardIndex, pipe: Any) -> None:
    pipe.send([reader.read(shard, 512, 100) for shard in index.shards])


@pytest.mark.parametrize("method", ["forkserver", "spawn"])  # a fork may inherit a lock of other tests' threads
def test_reader_in_use_pickles_to_processes(index: ShardIndex, method: str) -> None:
    reader = local(index)
    reader.read(index.shards[0], 0, 10)
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["pipeline.data.worker_pool"])  # the server stays for all tests that follow
    expected = [reader.read(shard, 512, 100) for shard in index.shards]
    with run_child(context, child, reader, index) as pipe:
        assert pipe.recv() == expected
    assert pickle.loads(pickle.dumps(reader)).read(index.shards[0], 512, 100) == expected[0]


def test_reader_file_url_is_local_folder(index: ShardIndex, tmp_path: Path) -> None:
    store = Store(f"file://{index.folder}")
    assert not store.remote
    reader = ShardReader(store, ShardCache(str(tmp_path / "cache"), GIB))
    assert reader.read(index.shards[0], 0, 512) == whole(index, 0)[:512]
    assert not (tmp_path / "cache").exists()


def test_reader_remote_shard_is_cached_once(index: ShardIndex, tmp_path: Path) -> None:
    with flaky_store() as store:
        for _ in range(2):
            reader = ShardReader(Store(f"flaky://{index.folder}"), ShardCache(str(tmp_path), GIB))
            for number, shard in enumerate(index.shards):
                assert reader.read(shard, 300, 400) == whole(index, number)[300:700]
        assert set(store.reads.values()) == {1}
        assert len(store.reads) == len(index.shards)


def test_reader_without_cache_reads_range(index: ShardIndex) -> None:
    with flaky_store() as store:
        reader = ShardReader(Store(f"flaky://{index.folder}"))
        assert reader.read(index.shards[1], 300, 400) == whole(index, 1)[300:700]
        assert reader.read(index.shards[1], 0, 400) == whole(index, 1)[:400]
        assert sum(store.reads.values()) == 3, "its size once, and two ranges"


@pytest.mark.parametrize("cached", [True, False])
def test_reader_passing_fault_is_retried(index: ShardIndex, tmp_path: Path, cached: bool) -> None:
    with flaky_store(fail_every=2):
        cache = ShardCache(str(tmp_path), GIB) if cached else None
        reader = ShardReader(Store(f"flaky://{index.folder}"), cache)
        assert all(reader.read(shard, 0, 9) == whole(index, n)[:9] for n, shard in enumerate(index.shards))


@pytest.mark.parametrize("cached", [True, False])
def test_reader_lasting_fault_names_shard(index: ShardIndex, tmp_path: Path, cached: bool) -> None:
    name = index.shards[2].name
    reader = ShardReader(Store(f"flaky://{index.folder}"), ShardCache(str(tmp_path), GIB) if cached else None)
    with flaky_store(fail_every=1), pytest.raises(ShardError, match=rf"{name}, .*connection reset"):
        reader.read(index.shards[2], 0, 9)
    with flaky_store(gone=frozenset({name})), pytest.raises(ShardError, match=name):
        reader.read(index.shards[2], 0, 9)


def test_reader_damaged_copies_raise(index: ShardIndex, tmp_path: Path) -> None:
    name = index.shards[0].name
    reader = ShardReader(Store(f"flaky://{index.folder}"), ShardCache(str(tmp_path), GIB))
    with flaky_store(spoiled=frozenset({name})) as store:
        with pytest.raises(ShardError, match=rf"{name}, .*sha256"):
            reader.read(index.shards[0], 0, 9)
        assert store.reads[name] == 6
    assert not list(tmp_path.glob("*.tar"))


def test_reader_full_disk_names_setting(index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    reader = ShardReader(Store(f"flaky://{index.folder}"), ShardCache(str(tmp_path), GIB))
    with flaky_store() as store:

        def no_space(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(store, "get_file", no_space)
        with pytest.raises(ShardError, match=r"\.tar in .*data\.cache_dir"):
            reader.read(index.shards[0], 0, 9)


def test_reader_prefetch_fills_cache(index: ShardIndex, tmp_path: Path) -> None:
    with flaky_store() as store:
        reader = ShardReader(Store(f"flaky://{index.folder}"), ShardCache(str(tmp_path), GIB))
        assert reader.prefetch(index.shards[3])
        reader.read(index.shards[3], 0, 9)
        assert store.reads == {index.shards[3].name: 1}
        full = ShardReader(reader.store, ShardCache(str(tmp_path / "small"), index.shards[0].bytes))
        assert full.prefetch(index.shards[0])
    assert local(index).prefetch(index.shards[0]), "there is nothing to fetch from a local folder"
