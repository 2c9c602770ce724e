"""The node's cache of shards: one download, checked, within its limit, whatever dies on the way."""

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import re
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

from pipeline.data import cache as module
from pipeline.data.cache import MARKER, CacheFullError, ShardCache
from pipeline.data.index import ShardInfo
from pipeline.errors import ConfigError, ShardError

SIZE = 1000


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def shard(number: int) -> ShardInfo:
    data = content(number)
    return ShardInfo(f"s-{number:06d}.tar", len(data), hashlib.sha256(data).hexdigest(), 1)


def source(number: int, log: Path | None = None, pause: float = 0.0) -> Callable[[Path, Callable[[], None]], None]:
    """Writes the shard in two halves, and a line into `log`."""

    def download(target: Path, check: Callable[[], None]) -> None:
        if log is not None:
            with log.open("a") as file:
                file.write(f"{number}\n")
        data = content(number)
        with target.open("wb") as file:
            file.write(data[: SIZE // 2])
            file.flush()
            time.sleep(pause)
            file.write(data[SIZE // 2 :])
        check()

    return download


def never(target: Path, check: Callable[[], None]) -> None:
    raise AssertionError("a shard that is here is downloaded again")


def names(folder: Path, suffix: str = ".tar") -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == suffix}


def tars(*numbers: int) -> set[str]:
    return {f"{shard(number).sha256}.tar" for number in numbers}


def test_reads_and_keeps(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10 * SIZE)
    assert cache.read(shard(1), 10, 5, source(1)) == content(1)[10:15]
    assert cache.read(shard(1), 0, SIZE, never) == content(1)
    assert cache.read(shard(1), SIZE - 2, 9, never) == content(1)[-2:], "the caller compares lengths"
    assert names(tmp_path / "cache", ".part") == set()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_equal_names_of_two_splits_do_not_meet(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    one, two = shard(1), ShardInfo(shard(1).name, SIZE, shard(2).sha256, 1)
    assert cache.read(one, 0, 1, source(1)) + cache.read(two, 0, 1, source(2)) == b"\1\2"


def test_the_least_recently_read_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 3 * SIZE)
    for number in (1, 2, 3, 1):
        time.sleep(0.01)  # file times
        cache.read(shard(number), 0, 1, source(number))
    cache.read(shard(4), 0, 1, source(4))
    assert names(tmp_path) == tars(1, 3, 4)
    cache.read(shard(5), 0, 1, source(5))
    assert names(tmp_path) == tars(1, 4, 5)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 3 * SIZE


def test_what_was_given_up_goes_before_all_else(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 3 * SIZE)
    for number in (1, 2, 3):
        cache.read(shard(number), 0, 1, source(number))
    cache.give_up(shard(3))
    cache.give_up(shard(2))
    cache.give_up(shard(9))
    cache.read(shard(2), 0, 1, never)  # another process needs it still
    cache.read(shard(4), 0, 1, source(4))
    assert names(tmp_path) == tars(1, 2, 4)


def test_a_shard_that_is_being_read_stays(tmp_path: Path) -> None:
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


def test_full_of_shards_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(str(tmp_path), SIZE)
    cache.read(shard(1), 0, 1, source(1))
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    with (tmp_path / f"{shard(1).sha256}.tar").open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        with pytest.raises(CacheFullError):
            cache.fetch(shard(2), source(2))
        with pytest.raises(ShardError, match=r"no room for s-000002\.tar .*data\.cache_gib"):
            cache.read(shard(2), 0, 1, source(2))


def test_a_shard_that_never_fits(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"s-000001\.tar has 1,000 bytes, more than data\.cache_gib"):
        ShardCache(str(tmp_path), SIZE - 1).read(shard(1), 0, 1, source(1))


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data[:-1] + b"x"])
def test_a_wrong_copy_is_not_kept(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)

    def download(target: Path, check: Callable[[], None]) -> None:
        target.write_bytes(spoil(content(1)))
        check()

    with pytest.raises(ValueError, match="its index"):  # `Store.download` tries again, then names the file
        cache.read(shard(1), 0, 1, download)
    assert names(tmp_path) == names(tmp_path, ".part") == set()
    assert cache.read(shard(1), 0, 1, source(1)) == b"\1"


def test_a_cut_file_is_replaced(tmp_path: Path) -> None:
    """A machine that lost power may have renamed a file whose bytes never reached the disk."""
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    cache.read(shard(1), 0, 1, source(1))
    os.truncate(tmp_path / f"{shard(1).sha256}.tar", 10)
    assert cache.read(shard(1), 500, 1, source(1)) == b"\1"


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


def test_one_download_however_many_processes_and_threads(tmp_path: Path) -> None:
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


def test_processes_in_a_tight_cache_read_right_bytes_within_the_limit(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", str(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    orders = [[(step * stride) % 7 + 1 for step in range(30)] for stride in (1, 2, 3)]
    processes = [context.Process(target=read_all, args=(folder, log, order, 0.002, 4 * SIZE)) for order in orders]
    largest = 0
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if os.path.isdir(folder):
            with module._locked(Path(folder) / "cache.lock", wait=True):  # nothing comes or goes meanwhile
                sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
                largest = max(largest, sum(size for name, size in sizes.items() if name != MARKER))
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert largest <= 4 * SIZE


def test_a_download_becomes_a_shard_while_nobody_lists_the_folder(tmp_path: Path) -> None:
    """A listing would meet it under both names or under neither, and room would be counted wrongly."""
    cache, downloaded = ShardCache(str(tmp_path / "cache"), 4 * SIZE), threading.Event()
    with contextlib.ExitStack() as listing:

        def download(target: Path, check: Callable[[], None]) -> None:
            source(1, tmp_path / "log")(target, check)
            listing.enter_context(module._locked(cache.folder / "cache.lock", wait=True))
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


def test_a_killed_owner_blocks_nobody(tmp_path: Path) -> None:
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


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match=r"cannot use data\.cache_dir .*file/cache: Not a directory"):
        ShardCache(str(tmp_path / "file" / "cache"), 10 * SIZE).read(shard(1), 0, 1, source(1))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_shard_that_may_not_be_read(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    cache.read(shard(1), 0, 1, source(1))
    (tmp_path / f"{shard(1).sha256}.tar").chmod(0)
    with pytest.raises(ShardError, match=r"cannot keep s-000001\.tar in .*: Permission denied; set data\.cache_dir"):
        cache.read(shard(1), 0, 1, never)


def test_a_fault_of_the_disk_names_shard_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    cache.read(shard(1), 0, 1, source(1))

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module.os, "pread", broken)
    with pytest.raises(ShardError, match=r"cannot keep s-000001\.tar in .*: Input/output error; set data\.cache_dir"):
        cache.read(shard(1), 0, 1, never)


def test_a_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path.stat().st_uid + 1
    monkeypatch.setattr(module.os, "getuid", lambda: other)
    (tmp_path / "cache").mkdir()
    if (tmp_path / "cache").stat().st_uid == 0:
        os.chown(tmp_path / "cache", other + 1, -1)
    with pytest.raises(ShardError, match="belongs to another user"):
        ShardCache(str(tmp_path / "cache"), 10 * SIZE).read(shard(1), 0, 1, source(1))


FOREIGN = [
    "x.tar",
    "x.part",
    "a.1.part",
    f"{'0' * 63}.tar",
    f"{'0' * 65}.tar",
    f"{'A' * 64}.tar",
    f"{'0' * 64}.tar.bak",
    f"{'0' * 64}.part",
    f"{'0' * 64}.x.part",
    f"{'0' * 64}",
    f".{'0' * 64}.tar",
]


@pytest.mark.parametrize("name", [*FOREIGN, "shards.lock"])
def test_a_folder_that_holds_files_of_others_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigError, match=re.escape(f"data.cache_dir {tmp_path} holds {name}")):
        ShardCache(str(tmp_path), 10 * SIZE).read(shard(1), 0, 1, never)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_folders_and_links_are_never_the_caches_own(tmp_path: Path, kind: str) -> None:
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


def test_a_cache_of_version_0_1_has_no_marker_and_is_taken(tmp_path: Path) -> None:
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
    def give_up(self, number: int) -> None:
        self.cache.give_up(shard(number))

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
    def what_is_of_others_stays(self) -> None:
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


def test_the_default_folder_is_this_users() -> None:
    assert str(os.getuid()) in ShardCache("", 1).folder.name
