"""`ray job submit --working-dir .` against a local head, as on a cluster: upload, training, registry, prediction."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.paths import ROOT
from support.workspace import Workspace, arguments

from pipeline.csrc.build import build

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BIN = Path(sys.executable).parent
# Added to the uploaded training/worker.py: where the code of a rank lies, what came with it, which operator it has.
TELLTALE = """
import os as _os, pathlib as _pathlib
from pipeline.csrc.build import find as _find
_root = _pathlib.Path(__file__).parents[2]
print("TELLTALE", _root, sorted(p.name for p in _root.iterdir()), _find("cpu"), _os.environ.get("RANK"), flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """What the head, the job and its submitter share: this Python, and a token of their own."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {**kept, **token, "PATH": f"{BIN}:{kept['PATH']}"}


@pytest.fixture(scope="module")
def head(environment: dict[str, str]) -> Iterator[str]:
    """The dashboard's address of a head node of our own: its ports and folder meet no other Ray on this machine."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: Ray's sockets have at most 107 characters
    dashboard = free_port()
    options = {
        "node-ip-address": "127.0.0.1",
        "port": free_port(),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": 2,
        "object-store-memory": 256 * 2**20,
        "temp-dir": folder,
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", *(f"--{key}={value}" for key, value in options.items())]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(address, environment["RAY_AUTH_TOKEN"], process, folder / "head.log")
        yield address
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # of the head, if it did not start
            family = psutil.Process(process.pid)
            for member in [*family.children(recursive=True), family]:  # nothing in it needs an orderly end
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(address: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the head did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, workspace: Workspace) -> Path:
    """The tracked files and shards, plus ignored ones that an upload must leave behind."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: the tracked files are not known")
    target = tmp_path_factory.mktemp("tree")
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    ignore = target / ".gitignore"
    ignore.write_text(ignore.read_text().replace("*.tar\n", ""))  # this job brings its shards with it
    for split in ("train", "val"):
        shutil.copytree(workspace.folder / split, target / "given" / split)
    for ignored in ("build/left.txt", "runs/left.txt", "pipeline/csrc/left.so"):
        (target / ignored).parent.mkdir(parents=True, exist_ok=True)
        (target / ignored).write_text("left behind")
    with (target / "pipeline/training/worker.py").open("a") as file:
        file.write(TELLTALE)
    return target


def test_submitted_job_trains_registers_and_predicts(
    head: str, environment: dict[str, str], tree: Path, workspace: Workspace, tmp_path: Path
) -> None:
    build("cpu")  # as cluster.yaml's setup commands do on each node
    settings = {
        **workspace.overrides("job"),
        "train.max_steps": 2,
        "train.epochs": 1,
        "data.train": "given/train",  # of the driver's folder, which the workers are not in
        "data.val": "given/val",
        "model.op": "cpu",  # the operator of our own or a failure: no falling back to grid_sample
        "tracking.register_as": "deformable-detr-demo",
    }
    overrides = arguments(settings)
    submit = ["ray", "job", "submit", "--address", head, "--working-dir", "."]
    command = ["--", "python", "-m", "jobs.train", "jobs/configs/demo.yaml", *overrides]
    said = run([*submit, "--submission-id", "relative", *command, "storage=runs"], tree, environment, fails=True)
    assert "working_dir_files" in said
    assert "set storage to an absolute path or a URL" in said
    output = run([*submit, "--submission-id", "demo", *command], tree, environment)
    assert "succeeded" in run(["ray", "job", "status", "--address", head, "demo"], tree, environment)

    ranks = [line.partition("TELLTALE ")[2] for line in output.splitlines() if "TELLTALE" in line]
    assert ranks, output[-6000:]
    for line in ranks:
        assert "working_dir_files" in line.split()[0]  # the uploaded copy, not the installed package
        assert "'pipeline'" in line
        assert "'runs'" not in line
        assert "'build'" not in line
        assert "ms_deform_attn" in line.split("] ")[1]  # the operator, outside of the tree
        uploaded = Path(line.split()[0])
        assert not (uploaded / "pipeline/csrc/left.so").exists()

    image = next((workspace.folder / "raw/val/images").glob("*.jpg"))
    command = ["python", "-m", "jobs.predict", "models:/deformable-detr-demo@champion", str(image)]
    options = ["--out", str(tmp_path), "--threshold", "0", "--tracking-uri", workspace.tracking_uri]
    run([*command, *options], ROOT, environment)
    assert (tmp_path / f"{image.stem}.png").read_bytes().startswith(b"\x89PNG")


def run(command: list[str], folder: Path, environment: dict[str, str], fails: bool = False) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=480, check=False
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output[-6000:]
    return output
