"""Runs that are killed at random moments, whatever part of them it is, lose nothing: `pytest -m slow` on this file.

`RANDOM_KILL_RUNS` is the number of runs, and `RANDOM_KILL_SEED` chooses their moments. One to three parts of each run
are killed: driver, worker, raylet, evaluation task, Ray's controller, or the writer of evaluations. A new driver goes
on where one is gone.
"""

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from support.chaos import Driver, Nodes, Step, assert_unchanged, kill, lines_of, steps_of
from support.metrics import losses, step_lines
from support.workspace import Workspace

from pipeline import checkpoint
from pipeline.config import Config
from pipeline.launch.ray_internals import CONTROLLER_TITLE, WORKER_TITLE
from pipeline.launch.snapshot import inspect_checkpoints, repair
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.record import RunRecord, read_run

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket"),  # Ray leaves some to the garbage collector
]
RUNS = int(os.environ.get("RANDOM_KILL_RUNS", "2"))
SEED = int(os.environ.get("RANDOM_KILL_SEED", "1"))
STEPS = 18  # in three epochs
TITLES = {
    "worker": WORKER_TITLE,
    "evaluation": "ray::evaluate",
    "controller": CONTROLLER_TITLE,
    "writer": "ray::ControlChannel",
}  # of the processes
VICTIMS = (*TITLES, "raylet", "driver")
STARTS = 8  # of drivers


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """One place for the worker and one for evaluations."""
    made = Nodes(2)
    yield made
    made.close()


def config_of(workspace: Workspace, name: str, where: str) -> Config:
    """One worker; every checkpoint is kept, so that a lost one is missed."""
    settings = {"epochs": 3, "eval_epochs": 1, "checkpoint_steps": 2, "keep_checkpoints": 50, "ema_decay": 0.9}
    changes = {f"train__{key}": value for key, value in settings.items()}
    scaling = {"scaling__num_workers": 1, "scaling__max_failures": -1}
    return workspace.config(name, evaluation__where=where, train__checkpoint_upload="async", **changes, **scaling)


@dataclass(frozen=True)
class Result:
    """What is left of a run that has ended."""

    record: RunRecord
    steps: dict[int, Step]
    losses: dict[int, list[float]]
    evaluations: list[dict[str, float]]
    checkpoints: set[int]  # steps

    @classmethod
    def of(cls, workspace: Workspace, config: Config, folder: Path) -> "Result":
        record = read_run(f"{config.storage}/{config.name}")
        names = [each.name for each in repair(record.folder)]
        rows = read_evaluations(record.folder)
        assert {row.checkpoint for row in rows} <= {*names}
        states = [checkpoint.load(f"{record.folder}/{name}").state for name in names]  # their digests are right
        steps = {state.global_step for state in states}
        return cls(record, steps_of(folder), losses(workspace, record), [row.entry for row in rows], steps)


@pytest.fixture(scope="module")
def whole(workspace: Workspace, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The runs that nothing happens to."""
    found = {}
    for where in ("inline", "tasks"):
        config, folder = config_of(workspace, f"whole_{where}", where), tmp_path_factory.mktemp(where)
        Driver(config, nodes.address, folder).finish()
        found[where] = Result.of(workspace, config, folder)
    return found


@pytest.mark.parametrize("number", range(RUNS))
def test_random_kills_lose_nothing(
    number: int, workspace: Workspace, nodes: Nodes, whole: dict[str, Result], tmp_path: Path
) -> None:
    dice = random.Random(f"{SEED} {number}")
    where = dice.choice(["inline", "tasks", "tasks"])
    config = config_of(workspace, f"random_{SEED}_{number}", where)
    drivers = [Driver(config, nodes.address, tmp_path)]
    victims = [VICTIMS[number % len(VICTIMS)], *dice.choices(VICTIMS, k=dice.randint(0, 2))]
    struck = []
    for victim in victims:
        if wait_for(dice.randint(0, STEPS), tmp_path, drivers[-1]):
            time.sleep(dice.uniform(0, 3))
        if strike(victim, nodes, drivers[-1], dice):
            struck.append(victim)
        if victim == "driver":
            drivers.append(Driver(config, nodes.address, tmp_path))
    while drivers[-1].process.wait(timeout=600) != 0:  # the controller takes it along
        assert len(drivers) < STARTS, drivers[-1].said
        drivers.append(Driver(config, nodes.address, tmp_path))
    print(f"run {number}: {where}, killed: {', '.join(struck) or 'nothing'}, {len(drivers)} drivers")
    unlisted = inspect_checkpoints(f"{config.storage}/{config.name}").left_alone
    result, expected = Result.of(workspace, config, tmp_path), whole[where]
    assert result.record.status == "FINISHED"
    assert result.steps == expected.steps
    assert result.losses == expected.losses
    assert step_lines(result.record) == [*range(1, STEPS + 1)]
    assert result.evaluations == expected.evaluations
    assert result.checkpoints == expected.checkpoints
    assert_unchanged(tmp_path, Path(result.record.folder))
    assert same_tensors(result.record, expected.record)
    # a worker may die between the end of its upload and Ray's note of it; what is left is complete and was said
    assert len(unlisted) <= len(struck)


def same_tensors(one: RunRecord, other: RunRecord) -> bool:
    a, b = checkpoint.load(one.last or ""), checkpoint.load(other.last or "")
    pairs = ((a.weights, b.weights), (a.moments, b.moments), (a.average or {}, b.average or {}))
    return all(
        mine.keys() == theirs.keys() and all(bool((mine[name] == theirs[name]).all()) for name in mine)
        for mine, theirs in pairs
    )


def wait_for(step: int, folder: Path, driver: Driver) -> bool:
    """Until the run has come to `step`; False if it ended before."""
    deadline = time.monotonic() + 300
    while driver.process.poll() is None and time.monotonic() < deadline:
        if max((line["step"] for line in lines_of(folder)), default=0) >= step:
            return True
        time.sleep(0.1)
    return False


def strike(victim: str, nodes: Nodes, driver: Driver, dice: random.Random) -> bool:
    """Kill it, if there is one before the run ends."""
    deadline = time.monotonic() + 60
    while driver.process.poll() is None and time.monotonic() < deadline:
        if victim == "driver":
            driver.kill()
            return True
        if victim == "raylet":
            nodes.kill_raylet(dice.choice(nodes.raylets))
            return True
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline() and process.cmdline()[0].startswith(TITLES[victim]):
                    kill(process.pid)
                    return True
            except psutil.Error:
                continue
        time.sleep(0.1)
    return False
