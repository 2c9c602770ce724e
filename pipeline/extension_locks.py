"""Locks that a killed build of a torch or DeepSpeed extension left behind; every later build waits for them for ever.

torch marks a build by an empty file `lock` that its maker keeps open and removes at the end; it does not say whose it
is. A lock is cleared only if no process of this machine has it open, and on a folder that other machines share only if
it is older than any build takes. Used by `nodes.py` before workers start.
"""

import os
import time
from pathlib import Path

from pipeline.runtime import get_logger

log = get_logger("extension_locks")
LONGEST_BUILD = 3600.0  # seconds
SHARED = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "virtiofs")


def extensions_folder() -> Path:
    """Where torch builds extensions. Its own function for that looks for CUDA first, which is not wanted here."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "torch_extensions"


def clear_stale_locks(folder: Path | None = None, processes: Path = Path("/proc")) -> list[Path]:
    """Remove the locks below `folder` whose makers are dead; returns them. Elsewhere than on Linux nothing is done."""
    folder = folder or extensions_folder()
    # <folder>/<extension>/lock, or with torch's default one level for Python and CUDA in between
    locks = sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]) if processes.is_dir() else []
    if not locks:
        return []
    opened = _open_files(processes)
    shared = _is_shared(folder, processes)
    cleared = []
    for lock in locks:
        if lock.resolve() in opened or (shared and time.time() - lock.stat().st_mtime < LONGEST_BUILD):
            continue
        lock.unlink(missing_ok=True)
        log.warning("removed %s: a build that was killed had left it", lock)
        cleared.append(lock)
    return cleared


def _open_files(processes: Path) -> set[Path]:
    """Every file that a process we may look into has open."""
    found = set()
    for link in processes.glob("[0-9]*/fd/*"):
        try:
            found.add(Path(os.readlink(link)))
        except OSError:  # it has just ended or is another user's, whose folder is another one
            continue
    return found


def _is_shared(folder: Path, processes: Path) -> bool:
    """Whether `folder` is on a file system that other machines write, too."""
    best, kind = "", ""
    for line in (processes / "self" / "mounts").read_text().splitlines():
        _, point, name, *_ = line.split()
        if folder.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, name
    return kind.removeprefix("fuse.") in SHARED
