"""Many processes share a cache: one download, within the limit, also if a process is killed."""

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.cache import FOREIGN, SIZE, content, names, never, shard, source

from pipeline.data import cache as module
from pipeline.data.cache import MARKER, CacheFullError, ShardCache
from pipeline.errors import ConfigError


def read_all(folder: str, log: Path, numbers: list[int], pause: float, limit: int) -> None:
    cache = ShardCache(folder, limit)
    for number in numbers:
        assert cache.read(shard(number), number, 3, source(number, log, pause)) == content(number)[:3]


def run_all(processes: list[Any]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_read_many_processes_and_threads_download_once(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", str(tmp_path / "cache")
    context = multiprocessing.get_context("fork")  # quick, and nothing here runs threads
    orders = [[1, 2, 3, 4], [4, 3, 2, 1], [2, 1, 4, 3], [1, 3, 2, 4]]
    run_all([context.Process(target=read_all, args=(folder, log, order, 0.05, 10 * SIZE)) for order in orders])
    assert sorted(log.read_text().split()) == ["1", "2", "3", "4"]
    threads = [threading.Thread(target=read_all, args=(folder, log, [5, 6], 0.05, 10 * SIZE)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(log.read_text().split()) == ["1", "2", "3", "4", "5", "6"]


def test_read_small_cache_processes_stay_within_limit(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", str(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    orders = [[(step * stride) % 7 + 1 for step in range(30)] for stride in (1, 2, 3)]
    processes = [context.Process(target=read_all, args=(folder, log, order, 0.002, 4 * SIZE)) for order in orders]
    largest = 0
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if os.path.isdir(folder):
            with module._hold_lock(Path(folder) / "cache.lock", wait=True):  # nothing comes or goes meanwhile
                sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
                largest = max(largest, sum(size for name, size in sizes.items() if name != MARKER))
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert largest <= 4 * SIZE


def test_fetch_rename_waits_for_listing(tmp_path: Path) -> None:
    """A listing would meet it under both names or under neither, and room would be counted wrongly."""
    cache, downloaded = ShardCache(str(tmp_path / "cache"), 4 * SIZE), threading.Event()
    with contextlib.ExitStack() as listing:

        def download(target: Path, check: Callable[[], None]) -> None:
            source(1, tmp_path / "log")(target, check)
            listing.enter_context(module._hold_lock(cache.folder / "cache.lock", wait=True))
            downloaded.set()

        thread = threading.Thread(target=cache.fetch, args=(shard(1), download))
        thread.start()
        assert downloaded.wait(30)
        thread.join(0.2)
        assert thread.is_alive()
        assert [path.suffix for path in cache.folder.iterdir() if path.suffix in (".tar", ".part")] == [".part"]
    thread.join(30)
    assert cache.read(shard(1), 1, 3, source(1, tmp_path / "log")) == content(1)[:3]


def hang(folder: str, started: Any) -> None:
    def download(target: Path, check: Callable[[], None]) -> None:
        target.write_bytes(b"half")
        started.set()
        time.sleep(600)

    ShardCache(folder, 10 * SIZE).read(shard(1), 0, 1, download)


def test_fetch_killed_owner_blocks_nobody(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    owner = context.Process(target=hang, args=(str(tmp_path), started))
    owner.start()
    assert started.wait(60)
    cache = ShardCache(str(tmp_path), 2 * SIZE)
    assert not cache.fetch(shard(1), never, wait=False), "it is left to its owner"
    os.kill(owner.pid or 0, signal.SIGKILL)
    owner.join()
    for number in (2, 3):  # what the dead one reserved is cleared away when there is need
        cache.read(shard(number), 0, 1, source(number))
    assert names(tmp_path, ".part") == set()
    assert cache.read(shard(1), 0, 1, source(1)) == b"\1"


def killed(folder: str, limit: int, number: int, at: int) -> None:
    """Fetch a shard, and be killed at one of the points on the way."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def download(target: Path, check: Callable[[], None]) -> None:
        if at == 0:
            die()
        target.write_bytes(content(number)[: SIZE // 2])
        if at == 1:
            die()
        target.write_bytes(content(number))
        if at == 2:
            die()
        check()

    if at == 3:
        Path.replace = lambda *_: die()  # type: ignore[assignment,method-assign]  # in this process alone
    cache = ShardCache(folder, limit)
    with contextlib.suppress(CacheFullError):
        cache.fetch(shard(number), download)


NUMBERS = st.integers(1, 6)


class CacheMachine(RuleBasedStateMachine):
    """What may happen to a cache that runs share with each other and with files of others."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.TemporaryDirectory()
        self.folder = Path(self.root.name) / "cache"
        self.limit = 3 * SIZE
        self.foreign: dict[str, bytes] = {}
        self.cache = ShardCache(str(self.folder), self.limit)

    def teardown(self) -> None:
        self.root.cleanup()

    def refused(self) -> bool:
        """Whether a new process may not use the folder."""
        return bool(self.foreign) and not (self.folder / MARKER).exists()

    @rule(number=NUMBERS, offset=st.integers(0, SIZE - 1))
    def read(self, number: int, offset: int) -> None:
        if self.refused():
            with pytest.raises(ConfigError, match=r"data\.cache_dir"):
                self.cache.read(shard(number), offset, 3, never)
            return
        expected = content(number)[offset : offset + 3]
        assert self.cache.read(shard(number), offset, 3, source(number)) == expected

    @precondition(lambda self: not self.refused())
    @rule(number=NUMBERS)
    def fetch(self, number: int) -> None:
        here = (self.folder / f"{shard(number).sha256}.tar").exists()
        assert self.cache.fetch(shard(number), never if here else source(number), wait=False)

    @rule(number=NUMBERS)
    def release(self, number: int) -> None:
        self.cache.release(shard(number))

    @precondition(lambda self: not self.refused())
    @rule(kept=NUMBERS, number=NUMBERS)
    def evict_beside_a_reader(self, kept: int, number: int) -> None:
        """A shard that somebody reads survives the eviction of all others."""
        self.cache.read(shard(kept), 0, 1, source(kept))
        place = self.folder / f"{shard(kept).sha256}.tar"
        with place.open("rb") as reader:
            fcntl.flock(reader, fcntl.LOCK_SH)
            for other in (number, *range(10, 13)):
                self.cache.read(shard(other), 0, 1, source(other))
            assert place.read_bytes() == content(kept)

    @precondition(lambda self: not self.refused())
    @rule(number=NUMBERS, at=st.integers(0, 3))
    def kill(self, number: int, at: int) -> None:
        process = multiprocessing.get_context("fork").Process(
            target=killed, args=(str(self.folder), self.limit, number, at)
        )
        process.start()
        process.join()

    @rule()
    def another_process(self) -> None:
        self.cache = ShardCache(str(self.folder), self.limit)

    @rule(name=st.sampled_from(FOREIGN), length=st.integers(0, 5 * SIZE))
    def foreign_file(self, name: str, length: int) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.foreign[name] = bytes([len(name)]) * length
        (self.folder / name).write_bytes(self.foreign[name])

    @invariant()
    def foreign_files_stay(self) -> None:
        assert all((self.folder / name).read_bytes() == data for name, data in self.foreign.items())

    @invariant()
    def the_limit_holds(self) -> None:
        """Downloads count in full from their start."""
        found = [path for path in self.folder.glob("*") if path.name not in self.foreign]
        shards, parts = ([p for p in found if p.suffix == suffix] for suffix in (".tar", ".part"))
        assert sum(path.stat().st_size for path in shards) + SIZE * len(parts) <= self.limit

    @invariant()
    def every_shard_is_whole(self) -> None:
        for path in self.folder.glob("*.tar"):
            if path.name not in self.foreign:
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
