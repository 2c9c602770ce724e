"""Object stores that fail: an fsspec file system in this process, and an HTTP server that all processes can reach."""

import errno
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline.files import retry


class FlakyStore(LocalFileSystem):
    """`flaky:///folder`: every `fail_every`-th read is refused, and the files named in `gone` do not exist."""

    protocol = "flaky"
    fail_every = 0
    gone: frozenset[str] = frozenset()
    spoiled: frozenset[str] = frozenset()  # files that arrive with a wrong byte
    reads: ClassVar[Counter[str]] = Counter()
    _asked = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        self._read(path)
        return super().cat_file(path, start=start, end=end, **options)

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        self._read(rpath)
        super().get_file(rpath, lpath, **options)
        if Path(rpath).name in self.spoiled:
            content = bytearray(Path(lpath).read_bytes())
            content[len(content) // 2] ^= 1
            Path(lpath).write_bytes(content)

    def size(self, path: str) -> Any:
        self._read(path)
        return super().size(path)

    def _read(self, path: str) -> None:
        store = type(self)
        store._asked += 1
        if Path(path).name in self.gone:
            raise FileNotFoundError(path)
        if self.fail_every and store._asked % self.fail_every == 0:
            raise OSError(errno.ECONNRESET, "connection reset")
        store.reads[Path(path).name] += 1


@contextmanager
def flaky_store(**faults: Any) -> Iterator[type[FlakyStore]]:
    """The store with these faults, registered; pauses between attempts last no time."""
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry.time, "sleep", lambda _: None)
        for name, value in {"reads": Counter(), "_asked": 0, **faults}.items():
            patch.setattr(FlakyStore, name, value)
        yield FlakyStore


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        name = Path(self.path).name
        with server.lock:
            server.asked += 1
            fails = server.fail_every and server.asked % server.fail_every == 0
            if not fails:
                server.reads[name] += 1
        if fails:
            self.send_error(503)
        elif name in server.gone:
            self.send_error(404)
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        if self.server.fail_every == 1:  # type: ignore[attr-defined]  # of `http_store`
            self.send_error(503)
        else:
            super().do_HEAD()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def http_store(folder: str, fail_every: int = 0, gone: frozenset[str] = frozenset()) -> Iterator[Any]:
    """Serves `folder` on a loopback port: `.url`, and `.reads` per file name."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Handler(*args, directory=folder))
    server.lock, server.asked, server.reads = threading.Lock(), 0, Counter()
    server.fail_every, server.gone = fail_every, gone
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
