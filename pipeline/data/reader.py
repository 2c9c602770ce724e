"""Reads the bytes of samples at their offsets: from local tars, from the node's cache, or over the network.

Local files are read with `pread` on a bounded number of descriptors, so one reader serves all shards without seeking.
Each process opens its own descriptors. A tar's size is checked before anything is read from it. Faults are ShardErrors
that name the shard.
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from pipeline.data.cache import CacheFullError, ShardCache
from pipeline.data.index import ShardInfo
from pipeline.errors import ShardError
from pipeline.files.shard_files import Store

OPEN_FILES = 64  # per process; far below the usual limit of 1,024


class ShardReader:
    """Reads one shard folder; cheap to pickle.

    Args:
        store: the folder.
        cache: where remote shards are kept; None reads each range over the network.
    """

    def __init__(self, store: Store, cache: ShardCache | None = None) -> None:
        self.store = store
        self.cache = cache if store.remote else None
        self._files: OrderedDict[str, int] = OrderedDict()
        self._checked: set[str] = set()  # remote shards whose size was compared

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def read(self, shard: ShardInfo, offset: int, length: int) -> bytes:
        """`length` bytes of a shard from `offset`. Raises ShardError."""
        if self.cache is not None:
            data = self.cache.read(shard, offset, length, self._download(shard))
        elif self.store.remote:
            data = self._read_remote(shard, offset, length)
        else:
            data = self._read_file(shard, offset, length)
        if len(data) != length:
            raise self.store.cut_short(shard.name)
        return data

    def prefetch(self, shard: ShardInfo) -> bool:
        """Download a shard into the cache, unless another process does it or there is no room.

        Returns:
            True if the cache has the shard now.

        Raises:
            ShardError: it cannot be downloaded.
        """
        if self.cache is None:
            return True
        try:
            return self.cache.fetch(shard, self._download(shard), wait=False)
        except CacheFullError:
            return False

    def release(self, shard: ShardInfo) -> None:
        """Let the cache remove a shard that this process does not need for some time."""
        if self.cache is not None:
            self.cache.release(shard)

    def _download(self, shard: ShardInfo) -> Any:
        def download(target: Path, check: Any) -> None:
            self.store.download(shard.name, target, check)

        return download

    def _read_file(self, shard: ShardInfo, offset: int, length: int) -> bytes:
        try:
            if shard.name not in self._files:
                self._open(shard)
            self._files.move_to_end(shard.name)
            return os.pread(self._files[shard.name], length, offset)
        except OSError as error:
            raise ShardError(f"cannot read {self.store.path(shard.name)}: {error.strerror}") from None

    def _open(self, shard: ShardInfo) -> None:
        while len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        descriptor = os.open(self.store.path(shard.name), os.O_RDONLY)
        try:
            self._compare(shard, os.fstat(descriptor).st_size)
        except ShardError:
            os.close(descriptor)
            raise
        self._files[shard.name] = descriptor

    def _read_remote(self, shard: ShardInfo, offset: int, length: int) -> bytes:
        if shard.name not in self._checked:
            self._compare(shard, self.store.size(shard.name))
            self._checked.add(shard.name)
        return self.store.read_range(shard.name, offset, length)

    def _compare(self, shard: ShardInfo, size: int) -> None:
        if size != shard.bytes:
            raise ShardError(
                f"{self.store.path(shard.name)} has {size:,} bytes, its index says {shard.bytes:,}: it is truncated or "
                f"of another build; run `python -m jobs.shard verify {self.store.folder}`"
            )
