"""Cache of remote shards on a node's disk: one download for all processes, checked, within a size limit.

A shard is a file named by its sha256. The first process that needs it takes the shard's lock, downloads to a temporary
name, checks size and sha256, and renames. The other processes wait for the lock and find the file. Locks are `flock`s
of the kernel, which end with their process, so a killed owner blocks nobody. To make room, released shards are removed
first, then the least recently read. A shard that is being read is never removed: its reader holds a shared lock.
Several runs may share a folder. Only plain files with names of the cache's form are counted or removed. A folder with
other files that is not marked as a cache is refused. Faults are ShardErrors that name the shard and the setting.
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
from pipeline.data.plan import max_open_shards
from pipeline.errors import ConfigError, ShardError
from pipeline.files.atomic import sync_to_disk
from pipeline.files.shard_files import Store

GIB = 2**30
FULL_CACHE_SECONDS = 600.0  # how long a reader waits for room in a full cache
POLL_SECONDS = 0.1
LOCK = "cache.lock"
MARKER = "deformable-detr-cache.txt"  # written while only the cache's files are in the folder
MARK = "Shards of data.cache_dir: files named by 64 hexadecimal digits are removed when others need their room.\n"
OWN_NAME = re.compile(r"(?P<sha256>[0-9a-f]{64})\.(?:tar|lock|(?P<bytes>[0-9]{1,18})\.part)")
Download = Callable[[Path, Callable[[], None]], None]  # (target, check), as `Store.download`


class CacheFullError(Exception):
    """Nothing more can be removed now. Callers of `ShardReader` never get this error."""


class ShardCache:
    """The folder of cached shards, shared by all processes of a node.

    Args:
        folder: `data.cache_dir`; empty means a folder of this user below the temporary folder (TMPDIR).
        limit: maximum bytes in the folder.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder = Path(folder or Path(tempfile.gettempdir()) / f"deformable-detr-shards-{os.getuid()}")
        self.limit = limit
        self._made = False

    def read(self, shard: ShardInfo, offset: int, length: int, download: Download) -> bytes:
        """Read up to `length` bytes of a shard from `offset`; download the shard first if it is not cached.

        Raises:
            ConfigError: the folder is not a cache.
            ShardError: the shard cannot be downloaded, or does not fit.
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
                if time.monotonic() - full_since > FULL_CACHE_SECONDS:
                    raise ShardError(
                        f"{self.folder} has had no room for {shard.name} for {FULL_CACHE_SECONDS:.0f} s; "
                        "raise data.cache_gib, or lower data.mix_shards"
                    ) from None
                time.sleep(POLL_SECONDS)

    def fetch(self, shard: ShardInfo, download: Download, wait: bool = True) -> bool:
        """Download the shard if it is not cached; without `wait`, skip it if another process is downloading it.

        Returns:
            True if it is cached now.

        Raises:
            CacheFullError: all other shards are being read or written.
            ConfigError: the folder is not a cache.
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
            with _hold_lock(self.folder / f"{shard.sha256}.lock", wait) as mine:
                if not mine:
                    return False
                if os.path.lexists(path):
                    return True
                self._make_room(shard.bytes, part)
                try:
                    download(part, lambda: _check(part, shard))
                    sync_to_disk(part)
                    with self._listing():  # else `_entries` may see the file under both names, or under neither
                        part.replace(path)
                finally:
                    part.unlink(missing_ok=True)
        return True

    def release(self, shard: ShardInfo) -> None:
        """Let the shard be removed first when room is needed, unless it is read again."""
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
            if status.st_size != shard.bytes:  # the machine stopped before the disk had the whole file
                self._path(shard).unlink(missing_ok=True)
                return None
            os.utime(descriptor)
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def _make_room(self, need: int, part: Path) -> None:
        """Remove unused shards until `need` bytes fit, and reserve the bytes by creating `part`."""
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
        """Hold the lock that keeps other processes from removing, reserving or renaming files."""
        with _hold_lock(self.folder / LOCK, wait=True):
            yield

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Yield (time of last use, bytes, path) of shards and downloads; a download counts with its final size."""
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if (own := _own(path)) and path.suffix != ".lock":
                    status = path.stat()
                    yield status.st_mtime_ns, int(own["bytes"] or status.st_size), path

    def make_folder(self) -> None:
        """Create the folder, once per process, and check that no other user can change its shards.

        Raises:
            ConfigError: it holds foreign files and is not marked as a cache.
            ShardError: it cannot be created, or belongs to another user.
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
                f"data.cache_dir {self.folder} holds {', '.join(sorted(foreign)[:3])}{more}, so it is not a cache of "
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
    """Match the name of a plain file of the cache; None for anything else in the folder."""
    return OWN_NAME.fullmatch(path.name) if path.is_file() and not path.is_symlink() else None


def _check(path: Path, shard: ShardInfo) -> None:
    size = path.stat().st_size
    if size != shard.bytes:
        raise ValueError(f"it has {size:,} bytes, the index says {shard.bytes:,}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise ValueError("its sha256 is not that of the index")


def _remove_unused(path: Path) -> bool:
    """Remove a shard that is not being read, or the download of a process that died."""
    shard = path.suffix == ".tar"
    lock = path if shard else path.parent / f"{path.name.partition('.')[0]}.lock"
    try:
        with _hold_lock(lock, wait=False, create=not shard) as free:
            if free:
                path.unlink(missing_ok=True)
            return free
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def _hold_lock(path: Path, wait: bool, create: bool = True) -> Iterator[bool]:
    """Hold the exclusive lock of a file; yields False if another process has it and `wait` is False."""
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

    All shards that are read at the same time and one more must fit, else every shard would be downloaded repeatedly.

    Args:
        index: of the data set.
        key: the setting that names it.
        data: the section.
        span: number of samples within which its order is rearranged, see `plan.max_open_shards`.
    """
    limit = int(data.cache_gib * GIB)
    if not limit or not Store(index.folder).remote:
        return
    sizes = sorted((shard.bytes for shard in index.shards), reverse=True)
    most = max_open_shards(len(index), len(sizes), data.mix_shards, span)
    need = sum(sizes[: most + 1])
    if need > limit:
        raise ConfigError(
            f"data.cache_gib={data.cache_gib:.3g} is too small for {key}: its order reads from up to {most} shards "
            f"at a time, {need / GIB:.3g} GiB with the next; raise it, lower data.mix_shards={data.mix_shards}, or set "
            "data.cache_gib=0 to read each sample over the network"
        )
