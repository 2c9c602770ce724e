"""Runs that stop, are killed, or have a damaged checkpoint, end with the weights of one that never stopped.

`test_chaos.py` has the whole matrix of what is killed at which moment.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import pytest
import ray
from support.chaos import Driver, Moment, assert_unchanged, kill, probed, steps_of
from support.metrics import assert_last_evaluation_is_verified, assert_report_has_the_numbers_of, losses
from support.resumed import STEPS, assert_same_end, config_of
from support.workspace import ROOT, Workspace, arguments

from pipeline import checkpoint
from pipeline.checkpoint import WEIGHTS
from pipeline.config import Config
from pipeline.errors import PreemptedError
from pipeline.launch import driver
from pipeline.launch.driver import train
from pipeline.launch.snapshot import FILE, repair
from pipeline.runs.record import FILE as RECORD
from pipeline.runs.record import RunRecord, read_run, run_exists

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_two_cpus")]


def steps_done(record: RunRecord) -> int:
    return checkpoint.load_state(record.last).global_step if record.last else 0


def after_step(folder: str, step: int, action: Callable[[], None]) -> threading.Thread:
    """Do something once the run has a checkpoint of `step` or later."""

    def wait() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if run_exists(folder) and steps_done(read_run(folder)) >= step:
                action()
                return
            time.sleep(0.1)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def train_until(config: Config, step: int, action: Callable[[], None], resume: str) -> RunRecord:
    """Train until `action`, done after `step`, makes the run leave."""
    folder = f"{config.storage}/{config.name}"
    thread = after_step(folder, step, action)
    with pytest.raises(PreemptedError, match="--resume=auto") as left:
        train(config, resume=resume)  # type: ignore[arg-type]
    thread.join()
    assert left.value.exit_code == 75
    return read_run(folder)


def terminate_driver() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_worker() -> None:
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    workers[-1].terminate()


@dataclass(frozen=True)
class Story:
    """The records of a run that was killed and stopped, and what its workers did."""

    left: RunRecord
    left_step: int
    end: RunRecord
    traces: Path


@pytest.fixture(scope="module")
def whole(workspace: Workspace) -> RunRecord:
    return train(config_of(workspace, "whole", checkpoint_upload="sync"))


@pytest.fixture(scope="module")
def story(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A worker is killed in a step, then the driver in an upload, both by SIGKILL.

    The next driver gets SIGTERM after the record was removed. Before the last one the run is moved and Ray's list of
    its checkpoints is cut short.
    """
    traces = tmp_path_factory.mktemp("traces")
    config = config_of(workspace, "left")
    folder = Path(config.storage) / config.name
    in_step, in_upload = Moment("accumulation", 5, rank=1), Moment("upload", 9)
    first = Driver(config, ray.get_runtime_context().gcs_address, traces, [in_step, in_upload])
    kill(first.reach(in_step, traces))
    first.reach(in_upload, traces)
    first.kill()

    def remove_record_and_terminate() -> None:
        (folder / RECORD).unlink()
        terminate_driver()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "train_worker", probed(traces, [], slow_after=9))
        left = train_until(config, 9, remove_record_and_terminate, "auto")
        step = steps_done(left)
        (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-20])
        moved = config.model_copy(update={"storage": str(workspace.folder / "moved")})
        Path(moved.storage).mkdir()
        folder.rename(Path(moved.storage) / config.name)
        patch.setattr(driver, "train_worker", probed(traces, []))
        return Story(left, step, train(moved, resume="auto"), traces)


def test_resume_after_sigterm_starts_from_its_checkpoint(story: Story) -> None:
    assert story.left.status == "PREEMPTED"
    assert story.left.stopped == "SIGTERM"
    assert 9 <= story.left_step < STEPS


def test_resume_after_kills_and_sigterm_ends_with_the_same_bits(
    workspace: Workspace, story: Story, whole: RunRecord
) -> None:
    assert (story.end.status, story.end.stopped) == ("FINISHED", "")
    assert (Path(story.end.folder) / f"{FILE}.damaged").exists()
    assert_same_end(story.end, whole)
    assert_unchanged(story.traces, Path(story.end.folder))
    assert losses(workspace, story.end) == losses(workspace, whole)


def test_resume_after_kills_repeats_each_step_with_the_same_images_and_losses(story: Story) -> None:
    steps = steps_of(story.traces)  # asserts that each attempt at a step had the same images, losses and gradient norm
    assert [*steps] == [*range(1, STEPS + 1)]
    for epoch in range(2):
        seen = [i for number in range(6) for ids in steps[6 * epoch + number + 1].groups.values() for i in ids]
        assert len(seen) == len({*seen}) == 48


def test_resume_continues_the_mlflow_run_and_names_the_checkpoints_that_exist(
    workspace: Workspace, story: Story
) -> None:
    client = mlflow.MlflowClient(workspace.tracking_uri)
    assert story.left.run_id == story.end.run_id
    run = client.get_run(story.end.run_id or "")
    assert (run.info.status, run.data.tags["run_status"]) == ("FINISHED", "FINISHED")
    assert run.data.metrics["perf/slowest_rank"] in (0, 1)
    assert 0 < run.data.metrics["perf/step_p50_s"] <= run.data.metrics["perf/step_p95_s"]
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == [*range(1, STEPS + 1)]
    rows = json.loads(Path(client.download_artifacts(run.info.run_id, "checkpoints.json")).read_text())
    assert {row["path"] for row in rows} == {str(path) for path in Path(story.end.folder).glob("checkpoint_0*")}
    assert rows[0]["path"] == story.end.last
    assert story.end.best in [row["path"] for row in rows if "val/AP" in row]


def test_resume_with_inline_evaluations_ends_with_report_and_verification(workspace: Workspace, story: Story) -> None:
    assert story.end.config["evaluation"]["where"] == "inline"
    assert_report_has_the_numbers_of(story.end)
    assert_last_evaluation_is_verified(workspace, story.end, STEPS)


@pytest.mark.slow
def test_resume_damaged_newest_checkpoint_continues_from_earlier(workspace: Workspace, whole: RunRecord) -> None:
    config = config_of(workspace, "damaged")
    left = train_until(config, 3, terminate_worker, "no")
    assert left.stopped == "a worker got SIGTERM"
    weights = Path(left.last or "") / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert_same_end(train(config, resume="must"), whole)


@pytest.mark.slow
def test_second_ctrl_c_ends_at_once_and_keeps_checkpoints(workspace: Workspace) -> None:
    """It runs as a command, as for a user's Ctrl-C, with its own Ray."""
    settings = {**workspace.overrides("pressed"), "train.checkpoint_steps": 1, "train.epochs": 500}
    overrides = arguments(settings)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "jobs.train", "jobs/configs/demo.yaml", *overrides]
    folder = f"{workspace.folder}/runs/pressed"
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:

        def press_twice() -> None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)

        thread = after_step(folder, 2, press_twice)
        thread.join()
        start = time.monotonic()
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said[-3000:]
    assert time.monotonic() - start < 60
    record = read_run(folder)
    assert record.status == "KILLED"
    assert [each for each in repair(folder) if each.state.global_step >= 2]
    for stored in repair(folder):
        checkpoint.load(f"{folder}/{stored.name}")
