"""Runs that are killed, change their world or fill their disk have the losses of an undisturbed run.

What is killed, at which moment: a worker, a raylet, the driver, the whole cluster; in the middle of an accumulation,
after a report, during an upload, at an epoch's end. `test_resume.py` has the short form.
"""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chaos import Driver, Moment, Nodes, assert_unchanged, kill, lines_of, steps_of, workers_alive
from support.metrics import losses
from support.resumed import STEPS, assert_same_end, config_of
from support.workspace import Workspace

from pipeline import checkpoint
from pipeline.config import Config
from pipeline.launch.snapshot import repair
from pipeline.runs.record import RunRecord, read_run

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket"),  # Ray leaves some to the garbage collector
]
PLAN = [Moment("accumulation", 5, rank=1), Moment("upload", 9), Moment("step", 12, rank=1), Moment("report", 15)]
KILLS, EPOCHS = 5, 30


class Ground:
    """The cluster of this file, made anew after it was killed."""

    def __init__(self) -> None:
        self.nodes = Nodes(2)

    def strike(self, victim: str, pid: int, driver: Driver) -> bool:
        """Kill the worker `pid`, its raylet, the driver, or all there is; True if the driver is gone with it."""
        if victim == "worker":
            kill(pid)
        elif victim == "raylet":
            self.nodes.kill_raylet(self.nodes.raylet_of_worker(pid))
        elif victim == "driver":
            driver.kill()
        else:
            driver.kill()
            self.nodes.kill_all()
            self.nodes.close()
            self.nodes = Nodes(2)
        return victim in ("driver", "cluster")


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    made = Ground()
    yield made
    made.nodes.close()


@pytest.fixture(scope="module")
def whole_folder(workspace: Workspace, ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    Driver(config_of(workspace, "undisturbed"), ground.nodes.address, folder).finish()
    return folder


@pytest.fixture(scope="module")
def whole(workspace: Workspace, whole_folder: Path) -> RunRecord:
    return record_of(config_of(workspace, "undisturbed"))


def record_of(config: Config) -> RunRecord:
    return read_run(f"{config.storage}/{config.name}")


@pytest.mark.parametrize(
    ("victim", "upload"), [("worker", "async"), ("raylet", "sync"), ("driver", "async"), ("cluster", "sync")]
)
def test_resume_after_kill_at_each_moment_loses_no_step(
    victim: str, upload: str, workspace: Workspace, ground: Ground, whole: RunRecord, whole_folder: Path, tmp_path: Path
) -> None:
    config = config_of(workspace, f"killed_{victim}", checkpoint_upload=upload)
    config = config.model_copy(update={"scaling": config.scaling.model_copy(update={"max_failures": len(PLAN)})})
    driver = Driver(config, ground.nodes.address, tmp_path, PLAN)
    for moment in PLAN:
        if ground.strike(victim, driver.reach(moment, tmp_path), driver):
            driver = Driver(config, ground.nodes.address, tmp_path, PLAN)
    driver.finish()
    end = record_of(config)
    assert end.status == "FINISHED"
    assert_same_end(end, whole)
    assert_unchanged(tmp_path, Path(end.folder))
    assert losses(workspace, end) == losses(workspace, whole)
    assert steps_of(tmp_path) == steps_of(whole_folder)
    assert len({*tmp_path.glob("trace_0_*.jsonl")}) == 1 + len(PLAN)


@pytest.mark.parametrize(
    ("least", "kinds"),
    [
        (2, ("worker", "raylet", "driver")),
        # Not the driver: Ray keeps the resources of an elastic run without a driver for three minutes.
        (1, ("worker", "worker", "raylet")),
    ],
    ids=["fixed", "elastic"],
)
def test_resume_after_random_kills_loses_no_step(
    least: int, kinds: tuple[str, ...], workspace: Workspace, ground: Ground, tmp_path: Path
) -> None:
    """Every few seconds, also at the start; an elastic run continues with one worker until a node comes back."""
    dice = random.Random(6)
    victims = [*dice.sample(kinds, len(kinds)), *dice.choices(kinds, k=KILLS - len(kinds))]
    config = config_of(workspace, f"random_{least}", epochs=EPOCHS, max_steps=None, eval_epochs=10)
    scaling = {"min_workers": least if least < 2 else None, "max_failures": -1}
    config = config.model_copy(update={"scaling": config.scaling.model_copy(update=scaling)})
    driver = Driver(config, ground.nodes.address, tmp_path)
    for victim in victims:
        if len(ground.nodes.raylets) < 2:
            wait_for_a_step(tmp_path, driver)
            ground.nodes.add()
        if dice.random() < 0.75:
            wait_for_a_step(tmp_path, driver)
        time.sleep(dice.uniform(0.5, 4))
        assert driver.process.poll() is None, f"it ended before a {victim} was killed:\n{driver.said}"
        if victim == "worker":
            while not (alive := workers_alive(tmp_path)):  # it is between two starts
                time.sleep(0.05)
            kill(dice.choice(alive))
        elif victim == "raylet":
            ground.nodes.kill_raylet(dice.choice(ground.nodes.raylets), replace=least == 2)
        else:
            driver.kill()
            driver = Driver(config, ground.nodes.address, tmp_path)
    driver.finish()
    while len(ground.nodes.raylets) < 2:  # for the next test
        ground.nodes.add()
    assert any(len(line["groups"]) == 4 for line in lines_of(tmp_path)) == (least == 1)  # one worker has had them all
    total = EPOCHS * 6
    end = record_of(config)
    assert end.status == "FINISHED"
    state = checkpoint.load_state(end.last or "")
    assert (state.global_step, state.optimizer_step, state.epoch) == (total, total, EPOCHS)
    logged = losses(workspace, end)
    assert sorted(logged) == [*range(1, total + 1)]
    assert {len(values) for values in logged.values()} == {1}
    steps = steps_of(tmp_path, same_world=False)
    assert [*steps] == [*range(1, total + 1)]
    for epoch in range(EPOCHS):
        seen = [i for number in range(6) for ids in steps[6 * epoch + number + 1].groups.values() for i in ids]
        assert len(seen) == len({*seen}) == 48


def wait_for_a_step(folder: Path, driver: Driver) -> None:
    """Until a worker has done one more."""
    before = sum(path.stat().st_size for path in folder.glob("trace_*.jsonl"))
    deadline = time.monotonic() + 300
    while driver.process.poll() is None and time.monotonic() < deadline:
        if sum(path.stat().st_size for path in folder.glob("trace_*.jsonl")) > before:
            return
        time.sleep(0.05)


def test_resume_at_other_worlds_and_stages_has_the_same_losses(
    workspace: Workspace, ground: Ground, whole_folder: Path, tmp_path: Path
) -> None:
    """Two workers, one, three; ZeRO 1, 2, 0: the losses of the run that stayed as it was."""
    third = ground.nodes.add()
    for until, workers, stage in ((4, 2, 1), (10, 1, 2), (STEPS, 3, 0)):
        config = config_of(workspace, "worlds", max_steps=until, zero_stage=stage)
        scaling = config.scaling.model_copy(update={"num_workers": workers})
        Driver(config.model_copy(update={"scaling": scaling}), ground.nodes.address, tmp_path).finish()
    ground.nodes.kill_raylet(third, replace=False)
    found, wanted = steps_of(tmp_path, same_world=False), steps_of(whole_folder)
    assert found.keys() == wanted.keys()
    for number, step in found.items():
        assert step.groups == wanted[number].groups
        first = number in (5, 11)
        assert step.losses["loss"] == pytest.approx(wanted[number].losses["loss"], rel=1e-6 if first else 1e-4), number


@pytest.fixture
def small_disk(whole: RunRecord, tmp_path: Path) -> Iterator[Path]:
    """Room for three checkpoints and a half."""
    if os.geteuid() != 0:
        pytest.skip("a small disk can be mounted by root only")
    size = 3.5 * sum(path.stat().st_size for path in Path(whole.last or "").iterdir())
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={int(size)}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_train_full_disk_keeps_earlier_checkpoints(
    small_disk: Path, workspace: Workspace, ground: Ground, whole: RunRecord, tmp_path: Path
) -> None:
    config = config_of(workspace, "full", keep_checkpoints=9, checkpoint_upload="sync")
    config = config.model_copy(update={"storage": str(small_disk)})
    driver = Driver(config, ground.nodes.address, tmp_path)
    assert driver.process.wait(timeout=600) == 1, driver.said
    assert "DiskFullError: cannot store " in driver.said
    assert "No space left on device; free space" in driver.said
    assert "restart 1" not in driver.said  # it would meet the same
    known = repair(f"{small_disk}/full")
    assert [stored.state.global_step for stored in known] == [3, 6, 9]
    for stored in known:
        checkpoint.load(f"{small_disk}/full/{stored.name}")
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    Driver(config, ground.nodes.address, tmp_path).finish()
    assert_same_end(record_of(config), whole)
