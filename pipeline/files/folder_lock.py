"""A lock on a folder, local or in a store, which one process of any host holds: the file `lock.json` in it.

The owner renews the file, and removes it at its end. If the owner was killed, its lock blocks nobody. On its own
machine the next process sees at once that it is gone. Elsewhere it sees that the file is no longer renewed, which takes
`SILENT_SECONDS`; clocks of two hosts are not compared. A process that starts at the same moment, or that takes over
from one that was suspended, may replace the file. So the owner reads it again, and learns that it has lost the lock.
A store needs no more than to read, write and remove a file, so a bucket will do.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import RunError
from pipeline.files.storage import error_reason, is_url, join, read_bytes, remove, write_bytes
from pipeline.logs import get_logger

FILE = "lock.json"
VERSION = 1
RENEW_SECONDS = 10.0
SILENT_SECONDS = 45.0  # without a renewal for so long, an owner on another machine counts as dead
SETTLE_SECONDS = 1.0  # after which a process that wrote the file at the same moment has done so
POLL_SECONDS = 1.0

log = get_logger("lock")
_silent: set["Owner"] = set()  # that were watched, so that nobody waits for them twice
_tokens: set[str] = set()  # of the locks that this process holds


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    token: str  # of this lock; random
    host: str
    machine: str  # equal where process ids mean the same processes
    pid: int
    born: str  # tells the process from a later one with its id
    since: str  # UTC
    renewals: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"

    @property
    def is_alive(self) -> bool | None:
        """Whether the process runs and holds it; None if that cannot be asked from this machine, or by this user."""
        if self.machine != _machine():
            return None
        born = _birth(self.pid)
        if born is None and _is_hidden(self.pid):
            return None
        # An earlier lock of this process may have stayed: a second Ctrl-C, or the store did not remove it.
        return born == self.born and (self.pid != os.getpid() or self.token in _tokens)

    @property
    def is_this_process(self) -> bool:
        """Whether it is the one that asks; containers give equal ids to their processes."""
        return self.pid == os.getpid() and self.is_alive is True


def read_owner(folder: str) -> Owner | None:
    """The owner of the lock on a folder (path or URL), which may have been killed; None if it is free.

    Raises:
        RunError: the file is damaged or of another version.
        OSError: the store does not give it.
    """
    path = join(folder, FILE)
    try:
        document = json.loads(read_bytes(path))
        if document.pop("version") != VERSION:
            raise ValueError("another version")
        return Owner(**document)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"{path} is not a lock that this code reads ({error}); remove it if nothing runs there"
        ) from None


def find_owner(folder: str) -> Owner | None:
    """The living owner of the lock on a folder; None if it is free or its owner was killed.

    An owner on another machine is watched for up to `SILENT_SECONDS`. Raises as `read_owner`.
    """
    owner = read_owner(folder)
    if owner is None or owner.is_alive is not None:
        return owner if owner and owner.is_alive else None
    if owner in _silent:
        return None
    log.info("%s was in use by %s: waiting up to %.0f s for a sign of it", folder, owner, SILENT_SECONDS)
    deadline = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        now = read_owner(folder)
        if now != owner:
            return None if now is None or now.is_alive is False else now
    _silent.add(owner)
    return None


class FolderLock:
    """Holds the lock on a folder within its context.

    Missing folders are created, and removed at the end if they are empty.

    Args:
        folder: a path or URL.
        lost: called in another thread with the new owner, if another process has taken over.
        then: what the user does when the owner has ended, for the message of a refusal.
    """

    def __init__(self, folder: str, lost: Callable[[Owner], None], then: str = "continue with --resume") -> None:
        self._folder, self._lost, self._then = folder, lost, then
        self._folders = _own_folders(folder)
        since = datetime.now(UTC).isoformat(" ", "seconds").removesuffix("+00:00") + " UTC"
        self._own = Owner(uuid.uuid4().hex, _host(), _machine(), os.getpid(), _birth(os.getpid()) or "", since)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="folder lock", daemon=True)

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            RunError: another process holds it.
        """
        try:
            if owner := find_owner(self._folder):
                raise RunError(in_use(self._folder, owner, self._then))
            try:
                _tokens.add(self._own.token)
                self._write()
                time.sleep(SETTLE_SECONDS)
                if owner := self.other_owner():
                    raise RunError(in_use(self._folder, owner, self._then))
            except BaseException:  # also Ctrl-C
                try:
                    self._remove()
                finally:
                    _tokens.discard(self._own.token)
                raise
        except OSError as error:
            raise RunError(f"cannot write {join(self._folder, FILE)}: {error_reason(error)}; check storage=") from None
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Release it."""
        self._closing.set()
        try:
            self._thread.join()
            self._remove()
        finally:
            _tokens.discard(self._own.token)

    def _remove(self) -> None:
        try:
            if not self.other_owner():
                remove(join(self._folder, FILE))
                with contextlib.suppress(OSError):  # one is not empty
                    for each in self._folders:
                        os.rmdir(each)
        except (OSError, RunError) as fault:
            log.warning("cannot remove %s, which blocks nobody: %s", join(self._folder, FILE), fault)

    def other_owner(self) -> Owner | None:
        """The process that has taken over the lock; None if it is held here. Raises as `read_owner`."""
        owner = read_owner(self._folder)
        return owner if owner and owner.token != self._own.token else None

    def _write(self) -> None:
        content = {"version": VERSION, **asdict(self._own)}
        write_bytes(join(self._folder, FILE), json.dumps(content, indent=1).encode())

    def _renew(self) -> None:
        failures = 0
        while not self._closing.wait(RENEW_SECONDS):
            try:
                if owner := self.other_owner():
                    self._lost(owner)
                    return
                self._own = replace(self._own, renewals=self._own.renewals + 1)
                self._write()
                failures = 0
            except (OSError, RunError) as error:
                failures += 1
                if failures == 2:  # one does no harm: a start also removes what it takes for left by a killed process
                    log.warning("cannot renew the lock on %s: %s", self._folder, error)


def in_use(folder: str, owner: Owner, then: str = "continue with --resume") -> str:
    """The message for a process that wants a folder which another one uses."""
    return f"{folder} is in use by {owner}: wait for its end, or stop it there (kill {owner.pid}), then {then}"


def _own_folders(folder: str) -> list[Path]:
    """The folders that a lock makes, innermost first: a local one and those around it, unless they are there.

    One that holds a lock already was made by a process that was killed.
    """
    path = Path(folder)
    made = not os.path.exists(path) or os.path.exists(path / FILE)
    if is_url(folder) or not made:
        return []
    return [path, *(parent for parent in path.parents if not os.path.exists(parent))]


def _host() -> str:
    return os.uname().nodename


def _machine() -> str:
    """The host, its boot and the namespace of its process ids: containers have one of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{_host()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # then its owner is watched
        return f"{_host()} {uuid.uuid4().hex}"


def _birth(pid: int) -> str | None:
    """When a process of this machine started, in ticks since the boot; None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _is_hidden(pid: int) -> bool:
    """Whether it is a process of another user, which /proc does not show where it is mounted with hidepid."""
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
    return False
