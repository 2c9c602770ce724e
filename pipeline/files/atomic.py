"""Atomic writes of local files: a reader, or the next start after a power cut, finds the old file or the whole new one.

Each new file is written under a temporary name in the same folder, synced to the disk and renamed. Temporary names hold
a random part and no process id, because nodes that share a folder may have equal process ids. Failures are OSErrors;
the old file then stays.
"""

import contextlib
import os
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.")  # the beginning of the names that `temporary_name` makes


def temporary_name(name: str) -> str:
    """A hidden, unique name with the same suffix for the unfinished file `name`."""
    return f".{uuid.uuid4().hex}.{name}"


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, and rename it to `path` if no exception was raised.

    The folder is created. Where `path` is a link, the file that it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
        rename_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file through `replace_file`."""
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def remove_unfinished(paths: Iterable[Path]) -> None:
    """Remove temporary files of these files that killed processes have left; nobody may be writing them."""
    folders: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder, name = os.path.split(os.path.realpath(path))
        folders[folder].add(name)
    for folder, names in folders.items():
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if (match := UNFINISHED.match(entry.name)) and entry.name[match.end() :] in names:
                    os.unlink(entry)


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file after its bytes have reached the disk, and wait until the new name has reached it too."""
    sync_to_disk(source)
    source.replace(target)
    with contextlib.suppress(OSError):  # not every file system syncs folders; the file itself is safe
        sync_to_disk(target.parent)


def sync_to_disk(path: Path) -> None:
    """Wait until the disk has the bytes of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
