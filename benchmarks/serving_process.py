"""`jobs.serve` as a process of its own: started, ready, its replicas, and stopped as by Ctrl-C in a terminal."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 300.0
STOP_SECONDS = 120.0
ENVIRONMENT = {"RAY_memory_monitor_refresh_ms": "0"}  # Ray would end replicas if other work fills the machine's memory
REPLICA, PROXY = "ray::ServeReplica", "ray::ProxyActor"  # how Ray titles their processes


@dataclass(frozen=True)
class ServerProcess:
    """A server that answers."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Its processes whose title starts with one of `titles`."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if " ".join(child.cmdline()).startswith(titles):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self) -> int:
        """Interrupt its process group, as a terminal does, and wait; the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def start_server(model: Path, log: Path, *flags: str) -> Iterator[ServerProcess]:
    """A server of a checkpoint on a free port of loopback, which is stopped at the end.

    Args:
        model: as `jobs.serve` takes it.
        log: file for its output.
        flags: of `jobs.serve`.

    Raises:
        RuntimeError: it ends or does not answer; with the end of its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jobs.serve", str(model), "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env={**os.environ, **ENVIRONMENT}
        )
    server = ServerProcess(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server)
        yield server
    finally:
        if process.poll() is None:
            try:
                server.stop()
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: ServerProcess) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.address}/readyz", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the server does not answer: {server.log.read_text(encoding='utf-8')[-3000:]}")
