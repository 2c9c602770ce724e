"""Small shards for tests of the cache: their content, downloads of them, and names of foreign files."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.data.index import ShardInfo

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
