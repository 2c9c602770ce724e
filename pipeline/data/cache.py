"""Remote shards on a node's disk: one download however many processes want it, checked, within a size limit.

A shard is a file named by its sha256. Whoever needs it first takes the shard's lock, downloads under another name,
compares size and sha256, and renames; the others wait for the lock and find the file. Locks are the kernel's
(`flock`): they end with their process, so a killed owner blocks nobody. To make room, the shard that was given up or
else read longest ago is removed, never one that is being read, on which its reader holds a shared lock. Several runs
may share a folder. Only plain files with names of the cache's own form are ever counted or removed; a folder that holds
others and was not marked as a cache is refused. Faults are ShardErrors that name the shard and the setting.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.data.index import ShardIndex, ShardInfo
from pipeline.data.plan import shards_at_once
from pipeline.errors import ConfigError, ShardError
from pipeline.files.atomic import sync_to_disk
from pipeline.files.shard_files import Store

GIB = 2**30
PATIENCE = 600.0  # seconds that a reader waits for others' downloads in a full cache
PAUSE = 0.1
LOCK = "cache.lock"
MARKER = "deformable-detr-cache.txt"  # made while nothing but the cache's own files is in the folder
MARK = "Shards of data.cache_dir: files named by 64 hexadecimal digits are removed when others need their room.\n"
OWN = re.compile(r"(?P<sha256>[0-9a-f]{64})\.(?:tar|lock|(?P<bytes>[0-9]{1,18})\.part)")
Download = Callable[[Path, Callable[[], None]], None]  # (target, check), as `Store.download`


class CacheFullError(Exception):
    """Nothing more can be removed now; never leaves the reading modules."""


class ShardCache:
    """A folder of shards that all processes of a node share.

    Args:
        folder: `data.cache_dir`; empty means a folder of this user below the temporary folder (TMPDIR).
        limit: of the bytes in it.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder = Path(folder or Path(tempfile.gettempdir()) / f"deformable-detr-shards-{os.getuid()}")
        self.limit = limit
        self._made = False

    def read(self, shard: ShardInfo, offset: int, length: int, download: Download) -> bytes:
        """Up to `length` bytes of a shard from `offset`, after its download if it is not here.

        Raises:
            ConfigError: the folder is no cache.
            ShardError: the shard cannot be had, or does not fit.
        """
        full_since: float | None = None
        while True:
            with self._faults_of(shard):
                self.make_folder()
                data = self._read_cached(shard, offset, length)
            if data is not None:
                return data
            try:
                self.fetch(shard, download)
            except CacheFullError:
                full_since = full_since or time.monotonic()
                if time.monotonic() - full_since > PATIENCE:
                    raise ShardError(
                        f"{self.folder} has had no room for {shard.name} for {PATIENCE:.0f} s; raise data.cache_gib, "
                        "or lower data.mix_shards"
                    ) from None
                time.sleep(PAUSE)

    def fetch(self, shard: ShardInfo, download: Download, wait: bool = True) -> bool:
        """Put the shard into the cache if it is not there; without `wait`, leave it to a process that is at it.

        Returns:
            True if it is there now.

        Raises:
            CacheFullError: all of it is being read or written.
            ConfigError: the folder is no cache.
            ShardError: see `read`.
        """
        path, part = self._path(shard), self.folder / f"{shard.sha256}.{shard.bytes}.part"
        if os.path.lexists(path):
            return True
        if shard.bytes > self.limit:
            raise ShardError(
                f"{shard.name} has {shard.bytes:,} bytes, more than data.cache_gib allows for all; raise it, or set "
                "it to 0 to read without a cache"
            )
        with self._faults_of(shard):
            self.make_folder()
            with _locked(self.folder / f"{shard.sha256}.lock", wait) as mine:
                if not mine:
                    return False
                if os.path.lexists(path):
                    return True
                self._make_room(shard.bytes, part)
                try:
                    download(part, lambda: _check(part, shard))
                    sync_to_disk(part)
                    with self._listing():  # else `_entries` may meet the file under both names, or under neither
                        part.replace(path)
                finally:
                    part.unlink(missing_ok=True)
        return True

    def give_up(self, shard: ShardInfo) -> None:
        """Let the shard be the first to go, if room is needed and nobody reads it again."""
        with contextlib.suppress(OSError):
            os.utime(self._path(shard), (0, 0))

    def _read_cached(self, shard: ShardInfo, offset: int, length: int) -> bytes | None:
        try:
            descriptor = os.open(self._path(shard), os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if status.st_nlink == 0:  # removed between `open` and the lock
                return None
            if status.st_size != shard.bytes:  # the machine died before the disk had all of it
                self._path(shard).unlink(missing_ok=True)
                return None
            os.utime(descriptor)
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def _make_room(self, need: int, part: Path) -> None:
        """Remove what nobody uses until `need` bytes fit, and reserve them by creating `part`."""
        with self._listing():
            entries = sorted(self._entries())
            used = sum(size for _, size, _ in entries)
            for _, size, path in entries:
                if used + need <= self.limit:
                    break
                if _remove_unused(path):
                    used -= size
            if used + need > self.limit:
                raise CacheFullError
            part.touch()

    @contextlib.contextmanager
    def _listing(self) -> Iterator[None]:
        """Nothing is removed, reserved or renamed by others."""
        with _locked(self.folder / LOCK, wait=True):
            yield

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of shards and of downloads, which count in full from their start."""
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if (own := _own(path)) and path.suffix != ".lock":
                    status = path.stat()
                    yield status.st_mtime_ns, int(own["bytes"] or status.st_size), path

    def make_folder(self) -> None:
        """Once per process: make the folder, and see that nobody else can change shards after they were checked.

        Raises:
            ConfigError: it holds files of others and is not marked as a cache.
            ShardError: it cannot be made, or is another user's.
        """
        if self._made:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.folder.stat().st_uid not in (os.getuid(), 0):
                raise ShardError(f"data.cache_dir {self.folder} belongs to another user; set one of your own")
            if not (self.folder / MARKER).exists():
                self._refuse_foreign()
                (self.folder / MARKER).write_text(MARK, encoding="utf-8")
        except OSError as error:
            raise ShardError(f"cannot use data.cache_dir {self.folder}: {error.strerror}; set another one") from None
        self._made = True

    def _refuse_foreign(self) -> None:
        foreign = [path.name for path in self.folder.iterdir() if path.name not in (LOCK, MARKER) and not _own(path)]
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise ConfigError(
                f"data.cache_dir {self.folder} holds {', '.join(sorted(foreign)[:3])}{more}, so it is no cache of "
                "shards; set data.cache_dir to a new or empty folder"
            )

    @contextlib.contextmanager
    def _faults_of(self, shard: ShardInfo) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ShardError(
                f"cannot keep {shard.name} in {self.folder}: {error.strerror or error}; set data.cache_dir to a folder "
                "of your own with space, on this node's disk"
            ) from None

    def _path(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.sha256}.tar"


def _own(path: Path) -> re.Match[str] | None:
    """What the name of a plain file of the cache says; None for all else that may be in the folder."""
    return OWN.fullmatch(path.name) if path.is_file() and not path.is_symlink() else None


def _check(path: Path, shard: ShardInfo) -> None:
    size = path.stat().st_size
    if size != shard.bytes:
        raise ValueError(f"it has {size:,} bytes, its index says {shard.bytes:,}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise ValueError("it does not have the sha256 of its index")


def _remove_unused(path: Path) -> bool:
    """Remove a shard that no reader has open, or the download of a process that died."""
    shard = path.suffix == ".tar"
    lock = path if shard else path.parent / f"{path.name.partition('.')[0]}.lock"
    try:
        with _locked(lock, wait=False, create=not shard) as free:
            if free:
                path.unlink(missing_ok=True)
            return free
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def _locked(path: Path, wait: bool, create: bool = True) -> Iterator[bool]:
    """Hold the exclusive lock of a file; yields False if another has it and `wait` is False."""
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def check_cache(index: ShardIndex, key: str, data: DataConfig, span: int) -> None:
    """Raise ConfigError if `data.cache_gib` is too small for a remote data set.

    What is read from at a time must fit, and one more, else each shard would be downloaded again and again.

    Args:
        index: of the data set.
        key: the setting that names it.
        data: the section.
        span: how many samples its order rearranges at a time, see `plan.shards_at_once`.
    """
    limit = int(data.cache_gib * GIB)
    if not limit or not Store(index.folder).remote:
        return
    sizes = sorted((shard.bytes for shard in index.shards), reverse=True)
    at_once = shards_at_once(len(index), len(sizes), data.mix_shards, span)
    need = sum(sizes[: at_once + 1])
    if need > limit:
        raise ConfigError(
            f"data.cache_gib={data.cache_gib:.3g} is too small for {key}: its order reads from up to {at_once} shards "
            f"at a time, {need / GIB:.3g} GiB with the next; raise it, lower data.mix_shards={data.mix_shards}, or set "
            "data.cache_gib=0 to read each sample over the network"
        )
