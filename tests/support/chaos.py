"""Runs that are killed at a chosen moment: workers that stop there and wait to die, and what they did until then.

`probed` makes a training function out of the product's that stops at the moments of a plan, each of them once in the
life of the run; a test waits for the mark, and kills by process id. `Driver` is a training command of its own, and
`Nodes` a cluster whose raylets can be killed. Nothing of it is known to the product.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray.train
from ray import cloudpickle
from ray.cluster_utils import Cluster

from pipeline.checkpoint import STATE, load_state
from pipeline.config import Config, dump, from_dict
from pipeline.data.batch import Batch
from pipeline.engine.step import Engine, StepResult
from pipeline.engine.zero import DeepSpeedBackend
from pipeline.launch import driver
from pipeline.model.weights.files import WEIGHTS, file_digest
from pipeline.training.saving import Upload
from pipeline.training.worker import train_worker
from support.cluster import ray_folder
from support.paths import ROOT

WAIT_SECONDS = 300.0
SLOW_SECONDS = 3.0  # of a step, so that a signal arrives before the last one
UPLOADED = "uploaded.jsonl"  # beside the traces: the digests of each checkpoint when its upload ended


@dataclass(frozen=True)
class Moment:
    """Where a rank stops; steps count from 1.

    `accumulation`: between two pad groups. `step`: done, but nothing saved. `report`: it has just returned. `upload`:
    half of the checkpoint lies in the storage.
    """

    name: str
    step: int
    rank: int = 0

    def mark(self, folder: Path) -> Path:
        return folder / f"{self.name}_{self.step}.pid"


class Probe:
    """Within one worker: writes a line per step, and stops at the first moment of the plan that was not reached yet."""

    def __init__(self, folder: str, plan: Sequence[Moment], slow_after: int | None = None) -> None:
        self._folder, self._slow_after = Path(folder), slow_after
        # One moment for each start: an upload in a thread of its own would else let a rank reach the next one, too.
        self._due = next((moment for moment in plan if not moment.mark(self._folder).exists()), None)
        self._rank = int(os.environ["RANK"])
        self._trace = self._folder / f"trace_{self._rank}_{os.getpid()}.jsonl"
        self._trace.touch()
        self._step = self._passes = 0

    def install(self) -> None:
        """Put this probe between the product's parts, in this process alone."""
        run_step, run_backward, report, upload = (
            Engine.train_step,
            DeepSpeedBackend.backward,
            ray.train.report,
            Upload.__call__,
        )

        def train_step(engine: Engine, batches: Sequence[Batch], step: int, stop: bool = False) -> StepResult:
            self._step, self._passes = step + 1, 0
            result = run_step(engine, batches, step, stop)
            groups = {batch.group: batch.image_ids.tolist() for batch in batches if batch.weight}
            line = {"step": self._step, "groups": groups, "losses": result.losses, "norm": result.grad_norm}
            with self._trace.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._reach("step", self._step)
            if self._slow_after is not None and self._step > self._slow_after:
                time.sleep(SLOW_SECONDS)
            return result

        def backward(backend: DeepSpeedBackend, loss: Any) -> None:
            run_backward(backend, loss)
            self._passes += 1
            if self._passes == 1:
                self._reach("accumulation", self._step)

        def reporting(metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            report(metrics, *args, **kwargs)
            self._reach("report", metrics["global_step"])

        def uploading(self_: Upload, local: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            step = load_state(local.path).global_step
            if self._is_due("upload", step):
                half_upload(Path(local.path), Path(self_._folder) / name)
            self._reach("upload", step)
            stored = upload(self_, local, name)
            with (self._folder / UPLOADED).open("a") as file:
                file.write(json.dumps({"name": name, "files": digests_of(Path(self_._folder) / name)}) + "\n")
            return stored

        Engine.train_step, DeepSpeedBackend.backward = train_step, backward  # type: ignore[method-assign]
        Upload.__call__, ray.train.report = uploading, reporting  # type: ignore[method-assign, assignment]

    def _is_due(self, name: str, step: int) -> bool:
        return self._due == Moment(name, step, self._rank) and not self._due.mark(self._folder).exists()

    def _reach(self, name: str, step: int) -> None:
        if not self._is_due(name, step):
            return
        mark = Moment(name, step, self._rank).mark(self._folder)
        temporary = mark.with_suffix(".writing")
        temporary.write_text(str(os.getpid()))
        temporary.replace(mark)
        time.sleep(WAIT_SECONDS)  # to be killed
        os._exit(1)


def digests_of(checkpoint: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(checkpoint.iterdir())}


def assert_unchanged(folder: Path, run: Path) -> None:
    """Every checkpoint of `run` has the files that were uploaded; `folder` is where the run left its traces.

    A worker that was killed just after an upload has left no trace of it.
    """
    uploaded = {each["name"]: each["files"] for each in map(json.loads, (folder / UPLOADED).read_text().splitlines())}
    there = {path.name: digests_of(path) for path in run.glob("checkpoint_*/") if path.name in uploaded}
    assert there
    assert there == {name: uploaded[name] for name in there}


def half_upload(local: Path, target: Path) -> None:
    """What a storage holds of a checkpoint in the worst case: all of its files, the weights cut short."""
    shutil.copytree(local, target)
    assert (target / STATE).exists()
    weights = (target / WEIGHTS).read_bytes()
    (target / WEIGHTS).write_bytes(weights[: len(weights) // 2])


def probed(folder: Path, plan: Sequence[Moment], slow_after: int | None = None) -> Callable[[dict[str, Any]], None]:
    """The product's training function, which leaves its traces and marks in `folder`; slow after a step, if given."""
    place, moments = str(folder), list(plan)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see the folder of tests

    def train_probed(payload: dict[str, Any]) -> None:
        Probe(place, moments, slow_after).install()
        train_worker(payload)

    return train_probed


class Driver:
    """`pipeline.launch.driver.train(resume="auto")` as a process of its own on the cluster at `address`."""

    def __init__(self, config: Config, address: str, folder: Path, plan: Sequence[Moment] = ()) -> None:
        folder.mkdir(exist_ok=True)
        self._log = folder / "driver.log"
        order = {"config": dump(config), "folder": str(folder), "plan": [asdict(moment) for moment in plan]}
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        command = [sys.executable, "-c", "from support.chaos import main; main()", json.dumps(order)]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def finish(self) -> None:
        """Wait for its good end."""
        code = self.process.wait(timeout=2 * WAIT_SECONDS)
        assert code == 0, self.said

    @property
    def said(self) -> str:
        return self._log.read_text()[-6000:]

    def reach(self, moment: Moment, folder: Path) -> int:
        """Wait for a moment; returns the process id of the rank that stopped there."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not moment.mark(folder).exists():
            assert self.process.poll() is None, f"it ended before {moment}:\n{self.said}"
            assert time.monotonic() < deadline, f"it did not come to {moment}:\n{self.said}"
            time.sleep(0.05)
        return int(moment.mark(folder).read_text())


def main() -> None:
    """Entry point of `Driver`."""
    order = json.loads(sys.argv[1])
    plan = [Moment(**each) for each in order["plan"]]
    driver.train_worker = probed(Path(order["folder"]), plan)
    driver.train(from_dict(order["config"]), resume="auto")


class Nodes:
    """A head that holds no worker, and nodes of one CPU, each with a raylet of its own; all can be killed."""

    def __init__(self, count: int) -> None:
        self._folder = ray_folder()
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": self._folder})
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def raylets(self) -> list[int]:
        """Process ids of the raylets that may hold workers."""
        return sorted(raylet_of(node) for node in self._cluster.worker_nodes)

    def add(self) -> int:
        """One more node; returns its raylet's process id."""
        return raylet_of(self._cluster.add_node(num_cpus=1))

    def raylet_of_worker(self, pid: int) -> int:
        """The raylet that has started the worker `pid`."""
        return next(parent.pid for parent in psutil.Process(pid).parents() if parent.pid in self.raylets)

    def kill_raylet(self, pid: int, replace: bool = True) -> None:
        """SIGKILL to the raylet `pid`; a new node takes its place."""
        (node,) = [node for node in self._cluster.worker_nodes if raylet_of(node) == pid]
        kill(pid)
        self._cluster.remove_node(node, allow_graceful=False)
        if replace:
            self.add()

    def kill_all(self) -> None:
        """SIGKILL to every process of every node at once, workers among them; `close` what is left."""
        roots = [
            each.process.pid
            for node in self._cluster.list_all_nodes()
            for several in node.all_processes.values()
            for each in several
        ]
        family = [psutil.Process(pid) for pid in roots if psutil.pid_exists(pid)]
        family += [child for process in family for child in process.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def close(self) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def raylet_of(node: Any) -> int:
    (raylet,) = node.all_processes["raylet"]
    return int(raylet.process.pid)


def kill(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).kill()


def workers_alive(folder: Path) -> list[int]:
    """Process ids of the workers of a run that are alive, by rank."""
    traces = sorted(folder.glob("trace_*.jsonl"), key=lambda path: int(path.stem.split("_")[1]))
    return [pid for pid in (int(path.stem.split("_")[2]) for path in traces) if psutil.pid_exists(pid)]


@dataclass
class Step:
    """What the ranks of a run did in one step."""

    losses: dict[str, float]
    norm: float
    groups: dict[str, list[int]]  # image ids of each pad group


def lines_of(folder: Path) -> Iterator[dict[str, Any]]:
    """What each worker of a run has written about each of its steps."""
    for path in folder.glob("trace_*.jsonl"):
        yield from map(json.loads, path.read_text().splitlines())


def steps_of(folder: Path, same_world: bool = True) -> dict[int, Step]:
    """Every step of a run, in order; those that were done again must have been the same, bit for bit.

    With `same_world=False` only the images must be; the losses are those of any attempt.
    """
    found: dict[int, Step] = {}
    for line in lines_of(folder):
        step = found.setdefault(line["step"], Step(line["losses"], line["norm"], {}))
        assert not same_world or (step.losses, step.norm) == (line["losses"], line["norm"]), line["step"]
        for group, ids in line["groups"].items():
            assert step.groups.setdefault(group, ids) == ids
    return dict(sorted(found.items()))
