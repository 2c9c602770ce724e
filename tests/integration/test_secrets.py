"""A whole training with a login in its environment: no file of the run, the store or Ray contains it, and no line."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mlflow_server import MlflowServer
from support.workspace import ROOT, Workspace, arguments

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SECRET = "hunter2secret"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """HOST:PORT of an MLflow server that takes any login."""
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    server = MlflowServer(tmp_path, [*store, "--artifacts-destination", str(tmp_path / "artifacts")])
    try:
        server.start()
        yield server.uri.removeprefix("http://")
    finally:
        server.kill()


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: Ray's sockets have at most 107 characters
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_train_with_login_stores_and_prints_it_nowhere(
    workspace: Workspace, server: str, ray_folder: Path, tmp_path: Path
) -> None:
    changes = {"storage": str(tmp_path / "runs"), "tracking.uri": "", "tracking.register_as": "secret"}
    settings = {**workspace.overrides("secret"), **changes, "train.max_steps": 2, "scaling.num_workers": 1}
    overrides = arguments(settings)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"MLFLOW_TRACKING_URI": f"http://me:{SECRET}@{server}", "RAY_TMPDIR": str(ray_folder)}
    command = [sys.executable, "-m", "jobs.train", "jobs/configs/demo.yaml", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    files = [path for folder in (tmp_path, ray_folder) for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"run.json", "server.db", "state.json", "MLmodel", "config.yaml"} <= names
    assert any(path.is_relative_to(ray_folder) and path.suffix == ".log" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
