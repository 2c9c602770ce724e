"""Two hosts with their own addresses, names and interfaces: ranks connect, and losses are those of one host."""

import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lan import Host, local_network
from support.metrics import losses
from support.workspace import Workspace, arguments

from pipeline import checkpoint
from pipeline.launch.driver import train
from pipeline.runs.record import read_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RAY = str(Path(sys.executable).parent / "ray")
PORT = 6379
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # a head asks for one if its user has one
SETTINGS = {"train.max_steps": 4, "train.eval_epochs": 9, "scaling.num_workers": 2}


@pytest.fixture
def folder() -> Iterator[Path]:
    made = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: Ray's sockets have at most 107 characters
    yield Path(made)
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def hosts(folder: Path) -> Iterator[list[Host]]:
    """A head that holds no worker and two hosts of one CPU, each with a raylet."""
    with local_network(3, folder) as made:
        common = ["--block", "--disable-usage-stats", f"--object-store-memory={256 * 2**20}"]
        for host in made:
            options = [f"--node-ip-address={host.address}", f"--num-cpus={int(host is not made[0])}", *common]
            if host is made[0]:
                options += ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={folder}"]
            else:
                options.append(f"--address={made[0].address}:{PORT}")
            process = host.start([RAY, "start", *options], folder / f"ray{host.number}.log", **TOKEN)
            wait_until_started(folder / f"ray{host.number}.log", process)
        yield made


def wait_until_started(log: Path, process: object) -> None:
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        if time.monotonic() > deadline or process.poll() is not None:  # type: ignore[attr-defined]
            pytest.fail(f"no raylet:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)


def run(host: Host, name: str, settings: dict[str, object], folder: Path) -> tuple[int, str]:
    """`jobs.train` on a host; its exit status and what it said."""
    overrides = arguments(settings)
    command = [sys.executable, "-m", "jobs.train", "jobs/configs/demo.yaml", *overrides]
    log = folder / f"{name}.log"
    driver = host.start(command, log, RAY_ADDRESS=f"{host.address}:{PORT}", **TOKEN)
    return driver.wait(timeout=400), log.read_text()


def test_train_on_hosts_with_several_interfaces_has_the_same_losses(
    hosts: list[Host], folder: Path, workspace: Workspace
) -> None:
    private = {**workspace.overrides("private"), **SETTINGS, "storage": f"{folder}/private/runs"}
    code, said = run(hosts[0], "private", private, folder)
    assert code == 2, said
    assert f"storage {folder}/private/runs is not the one that the driver writes" in said
    assert f"node {hosts[1].address}" in said or f"node {hosts[2].address}" in said

    before = [host.received("lan") for host in hosts]
    code, said = run(hosts[0], "lan", {**workspace.overrides("lan"), **SETTINGS}, folder)
    assert code == 0, said[-6000:]
    record = read_run(f"{workspace.folder}/runs/lan")
    gradients = sum(w.numel() * 4 for w in checkpoint.load(record.last or "").weights.values()) * 4
    for host, start in zip(hosts[1:], before[1:], strict=True):
        assert host.received("lan") - start > gradients, "the gradients of four steps came another way"
        assert host.received("inner") < 10_000

    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="WARNING")
    try:
        alone = train(workspace.config("alone", **{key.replace(".", "__"): v for key, v in SETTINGS.items()}))
    finally:
        ray.shutdown()
    assert losses(workspace, record) == losses(workspace, alone)
    assert len(losses(workspace, alone)) == 4
