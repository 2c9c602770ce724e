"""Runs on a cluster whose number of nodes changes: several raylets on this machine, one worker on each."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from support.cluster import several_nodes
from support.metrics import losses
from support.workspace import Workspace

from pipeline import checkpoint
from pipeline.errors import PreemptedError
from pipeline.launch.driver import train
from pipeline.runs.record import read_run, run_exists
from pipeline.training.stopping import NOTICE

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 40


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with several_nodes() as made:
        yield made


def drain_once_trained(cluster: Cluster, folder: str) -> threading.Thread:
    """Once the run has a checkpoint, say that the newest node will be taken away, as a cloud does."""

    def drain() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (run_exists(folder) and read_run(folder).last):
            time.sleep(0.1)
        node = cluster.list_all_nodes()[-1].node_id
        options = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address, *options]
        subprocess.run([*command, "--deadline-remaining-seconds", "120"], check=True, capture_output=True)

    thread = threading.Thread(target=drain)
    thread.start()
    return thread


def test_preemption_notice_saves_and_fewer_workers_continue(cluster: Cluster, workspace: Workspace) -> None:
    settings = {"train__global_batch": 4, "train__epochs": 4, "train__max_steps": STEPS, "train__checkpoint_steps": 4}
    config = workspace.config("spot", scaling__num_workers=2, train__eval_epochs=9, **settings)
    folder = f"{config.storage}/spot"
    thread = drain_once_trained(cluster, folder)
    with pytest.raises(PreemptedError, match=NOTICE):
        train(config)
    thread.join()
    left = read_run(folder)
    assert left.status == "PREEMPTED"
    step = checkpoint.load_state(left.last or "").global_step
    assert step < STEPS
    cluster.remove_node(cluster.list_all_nodes()[-1])
    smaller = workspace.config("spot", scaling__num_workers=2, scaling__min_workers=1, train__eval_epochs=9, **settings)
    record = train(smaller, resume="auto")
    assert record.status == "FINISHED"
    by_step = losses(workspace, record)
    assert sorted(by_step) == list(range(1, STEPS + 1))
    assert all(len(values) == 1 for values in by_step.values())
