"""A PostgreSQL server of a test's own, with its data in a temporary folder, from Debian's binaries."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.s3 import free_port

USER = DATABASE = "mlflow"
PROGRAMS = ("initdb", "postgres", "pg_isready", "createdb")
START_SECONDS = 60.0


@contextmanager
def postgres(password: str) -> Iterator[str]:
    """The address of an empty database without its login: clients find the password in PGPASSWORD."""
    binaries = _binaries()
    folder = Path(tempfile.mkdtemp(prefix="postgres", dir="/tmp"))  # not in pytest's, which only we may enter
    try:
        (folder / "password").write_text(password)
        if os.geteuid() == 0:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        yield from _serve(binaries, folder, password)
    finally:
        shutil.rmtree(folder)


def _serve(binaries: Path, folder: Path, password: str) -> Iterator[str]:
    data, port = folder / "data", free_port()
    login = [f"--username={USER}", "--auth=scram-sha-256", f"--pwfile={folder}/password"]
    _run([binaries / "initdb", f"--pgdata={data}", *login, "--encoding=UTF8", "--locale=C", "--no-sync"])
    settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
    command = [binaries / "postgres", "-D", data, "-p", str(port)]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **_identity())
    try:
        server = ["--host=127.0.0.1", f"--port={port}", f"--username={USER}"]
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run([binaries / "pg_isready", *server], capture_output=True, check=False).returncode:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        _run([binaries / "createdb", *server, DATABASE], PGPASSWORD=password)
        yield f"postgresql://{USER}@127.0.0.1:{port}/{DATABASE}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:  # it waits for clients that were killed
            process.kill()
            process.wait()


def _binaries() -> Path:
    """Where PostgreSQL's programs are; skips without them."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)  # Debian keeps them out of PATH
    places += [Path(found).parent for found in (shutil.which("initdb"),) if found]
    place = next((each for each in places if all((each / name).exists() for name in PROGRAMS)), None)
    if place is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    return place


def _identity() -> dict[str, Any]:
    """PostgreSQL refuses to run as root; Debian's package has made a user for it."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


def _run(command: list[Any], **environment: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd="/", env={**os.environ, **environment}, check=False, **_identity()
    )
    assert done.returncode == 0, done.stderr
