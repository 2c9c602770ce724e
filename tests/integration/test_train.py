"""Whole runs through Ray Train, DeepSpeed, evaluation, MLflow: uninterrupted, killed, resumed."""

import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from support.chaos import assert_unchanged, probed
from support.metrics import (
    assert_last_evaluation_is_verified,
    assert_report_has_the_numbers_of,
    losses,
    step_lines,
)
from support.workspace import Workspace

from pipeline import checkpoint
from pipeline.engine.ema import decay_at
from pipeline.errors import ConfigError, PipelineError, ResourceError, RunError
from pipeline.evaluation.task import RETRIES
from pipeline.launch import driver
from pipeline.launch.driver import train
from pipeline.launch.ray_internals import CONTROLLER_TITLE
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.record import FILE, RunRecord, read_run, run_exists

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_two_cpus")]
STEPS = 12


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `one_worker` leaves the digests of its checkpoints."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def one_worker(workspace: Workspace, traces: Path) -> RunRecord:
    """On one of the two CPUs, so that evaluation takes the other; three steps are traced."""
    changes = {
        "train__ema_decay": 0.9,
        "evaluation__where": "auto",
        "train__profile_steps": [2, 4],
        "train__eval_epochs": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "train_worker", probed(traces, []))
        return train(workspace.config("one", scaling__num_workers=1, **changes))


@pytest.fixture(scope="module")
def killed(workspace: Workspace) -> RunRecord:
    """Two workers, a checkpoint every 2 steps; one worker process is killed after the first checkpoint."""
    killer = threading.Thread(target=kill_a_worker, args=(str(workspace.folder / "runs" / "killed"),))
    killer.start()
    record = train(workspace.config("killed", train__checkpoint_steps=2, train__ema_decay=0.9))
    killer.join(timeout=10)
    assert not killer.is_alive(), "no worker was killed"
    return record


def kill_a_worker(folder: str) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if run_exists(folder) and read_run(folder).last:
            workers = [
                p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
            ]
            if workers:
                os.kill(workers[-1].pid, signal.SIGKILL)
                return
        time.sleep(0.05)


@contextmanager
def no_evaluation_survives() -> Iterator[list[int]]:
    """Evaluation tasks are killed as soon as they are seen; yields their process ids."""
    killed: list[int] = []
    ended = threading.Event()

    def hunt() -> None:
        while not ended.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if process.pid not in killed and "ray::evaluate" in "".join(process.cmdline()[:1]):
                        process.kill()
                        killed.append(process.pid)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        yield killed
    finally:
        ended.set()
        hunter.join()


def test_train_writes_record_checkpoint_and_metrics(workspace: Workspace, one_worker: RunRecord) -> None:
    assert one_worker.status == "FINISHED"
    state = checkpoint.load_state(one_worker.last or "")
    assert (state.epoch, state.step, state.global_step) == (2, 0, STEPS)
    run = mlflow.MlflowClient(workspace.tracking_uri).get_run(one_worker.run_id or "")
    assert run.info.status == "FINISHED"
    assert run.data.params["train.global_batch"] == "8"
    newest = read_evaluations(one_worker.folder)[-1]
    assert f"{one_worker.folder}/{newest.checkpoint}" == one_worker.last
    assert run.data.metrics["val/AP"] == pytest.approx(newest.entry["AP"])
    assert sorted(losses(workspace, one_worker)) == list(range(1, STEPS + 1))
    assert step_lines(one_worker) == list(range(1, STEPS + 1))


def test_report_run_of_evaluation_tasks_has_the_numbers_of_the_record(one_worker: RunRecord) -> None:
    assert one_worker.config["evaluation"]["where"] == "tasks"
    assert_report_has_the_numbers_of(one_worker)


def test_evaluation_task_reports_to_record_mlflow_and_driver(workspace: Workspace, one_worker: RunRecord) -> None:
    assert one_worker.config["evaluation"]["where"] == "tasks"
    client = mlflow.MlflowClient(workspace.tracking_uri)
    history = client.get_metric_history(one_worker.run_id or "", "val/AP")
    scores = {metric.step: metric.value for metric in history}
    assert sorted(scores) == [STEPS // 2, STEPS]  # also of the last epoch, whose task ended after the workers
    assert len(history) == len(scores)
    rows = read_evaluations(one_worker.folder)
    assert {row.entry["step"]: row.entry["AP"] for row in rows} == scores
    assert one_worker.metrics["val/AP"] == max(scores.values())
    [best] = [row for row in rows if f"{one_worker.folder}/{row.checkpoint}" == one_worker.best]
    assert best.entry["AP"] == max(scores.values())
    listed = json.loads(Path(client.download_artifacts(one_worker.run_id or "", "checkpoints.json")).read_text())
    assert {row["path"] for row in listed} == {str(path) for path in Path(one_worker.folder).glob("checkpoint_*/")}
    assert {row["global_step"]: row["val/AP"] for row in listed} == scores


def test_last_evaluation_of_a_task_is_verified_by_pycocotools(workspace: Workspace, one_worker: RunRecord) -> None:
    assert_last_evaluation_is_verified(workspace, one_worker, STEPS)


def test_evaluation_task_changes_no_checkpoint(one_worker: RunRecord, traces: Path) -> None:
    assert_unchanged(traces, Path(one_worker.folder))


def test_profile_steps_writes_a_trace(workspace: Workspace, one_worker: RunRecord) -> None:
    name = "steps_2-4.json.gz"
    with gzip.open(Path(one_worker.folder) / "profile" / name) as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name") == "autograd::engine::evaluate_function: ConvolutionBackward0" for event in events)
    client = mlflow.MlflowClient(workspace.tracking_uri)
    assert [info.path for info in client.list_artifacts(one_worker.run_id or "", "profile")] == [f"profile/{name}"]


@pytest.mark.slow  # test_resume has a worker that is killed
def test_killed_worker_loses_no_step(workspace: Workspace, killed: RunRecord) -> None:
    assert killed.status == "FINISHED"
    assert checkpoint.load_state(killed.last or "").global_step == STEPS
    by_step = losses(workspace, killed)
    assert sorted(by_step) == list(range(1, STEPS + 1))
    assert all(len(values) == 1 for values in by_step.values())
    assert step_lines(killed) == list(range(1, STEPS + 1))
    metrics = mlflow.MlflowClient(workspace.tracking_uri).get_run(killed.run_id or "").data.metrics
    assert metrics["perf/slowest_rank"] in (0, 1)
    assert 0 < metrics["perf/step_p50_s"] <= metrics["perf/step_p95_s"]


@pytest.mark.slow  # test_equal_worlds has it without Ray
def test_first_losses_are_equal_at_one_and_two_workers(
    workspace: Workspace, one_worker: RunRecord, killed: RunRecord
) -> None:
    one, two = losses(workspace, one_worker), losses(workspace, killed)
    for step in range(1, 6):
        assert two[step][0] == pytest.approx(one[step][0], rel=1e-5), step


def test_evaluation_uses_the_average(one_worker: RunRecord) -> None:
    stored = checkpoint.load(one_worker.last or "")
    assert stored.average is not None
    model = checkpoint.load_inference(one_worker.last or "").model
    assert all(torch.equal(tensor, stored.average[name]) for name, tensor in model.state_dict().items())
    assert any(not torch.equal(tensor, stored.weights[name]) for name, tensor in stored.average.items())


def test_resume_finished_run_with_more_epochs_continues(workspace: Workspace, one_worker: RunRecord) -> None:
    """By one step, so that the average after it can be computed from the two checkpoints; nothing can evaluate it."""
    before = checkpoint.load(one_worker.last or "")
    config = workspace.config(
        "one",
        scaling__num_workers=1,
        train__ema_decay=0.9,
        train__epochs=3,
        train__max_steps=STEPS + 1,
        evaluation__where="tasks",
    )
    with no_evaluation_survives() as killed:
        record = train(config, resume="must")
    assert len(killed) == 1 + RETRIES
    assert record.status == "FINISHED"
    assert record.best == one_worker.best
    assert STEPS + 1 not in {row.entry["step"] for row in read_evaluations(record.folder)}
    assert record.run_id == one_worker.run_id
    assert sorted(losses(workspace, record)) == list(range(1, STEPS + 2))
    after = checkpoint.load(record.last or "")
    assert after.state.global_step == STEPS + 1
    assert before.average is not None
    assert after.average is not None
    moved = 1 - decay_at(STEPS + 1, 0.9)
    for name, value in after.average.items():
        assert torch.equal(value, torch.lerp(before.average[name], after.weights[name], moved)), name


@pytest.mark.slow
def test_compiled_run_has_the_same_losses(workspace: Workspace, one_worker: RunRecord) -> None:
    config = workspace.config("compiled", scaling__num_workers=1, train__compile=True, train__max_steps=4)
    record = train(config)
    compiled, eager = losses(workspace, record), losses(workspace, one_worker)
    assert sorted(compiled) == [1, 2, 3, 4]
    for step in compiled:
        assert compiled[step][0] == pytest.approx(eager[step][0], rel=1e-4), step
    names = checkpoint.load(record.last or "").weights
    assert names.keys() == checkpoint.load(one_worker.last or "").weights.keys()


@pytest.mark.slow
def test_resume_fp16_zero_3_offload_as_fp32_continues(workspace: Workspace) -> None:
    """Every setting of the step that is not a default, through a whole run; and back to the defaults at a resume."""
    changes = {
        "precision": "fp16", "zero_stage": 3, "offload_optimizer": True, "drift_steps": 1, "deterministic": True,
        "hang_minutes": 5,
    }  # fmt: skip
    schedule = {"optim__schedule": "cosine", "optim__warmup_steps": 2}
    config = workspace.config("low", **{f"train__{key}": value for key, value in changes.items()}, **schedule)
    record = train(config)
    state = checkpoint.load_state(record.last or "")
    assert state.global_step == STEPS
    assert 0 < state.optimizer_step <= STEPS
    assert 2**10 <= state.loss_scale["scale"] <= 2**16
    run = mlflow.MlflowClient(workspace.tracking_uri).get_metric_history(record.run_id or "", "lr/main")
    rates = {metric.step: metric.value / config.optim.lr for metric in run}
    assert rates[1] == pytest.approx(0.5)
    assert rates[3] == pytest.approx(1)
    assert rates[STEPS] < 0.1
    record = train(workspace.config("low", train__epochs=3, train__drift_steps=2), resume="must")
    again = checkpoint.load_state(record.last or "")
    assert again.global_step == STEPS // 2 * 3
    assert again.optimizer_step == state.optimizer_step + STEPS // 2


def test_train_existing_name_raises(workspace: Workspace, one_worker: RunRecord) -> None:
    with pytest.raises(RunError, match="--resume"):
        train(workspace.config("one"))


def test_resume_with_another_model_raises(workspace: Workspace, one_worker: RunRecord) -> None:
    with pytest.raises(RunError, match=r"model\.queries\b.*\b10\b.*\b11\b"):
        train(workspace.config("one", model__queries=11), resume="must")


def test_train_too_many_workers_raises_with_numbers(workspace: Workspace) -> None:
    with pytest.raises(ResourceError, match=r"\b64 CPUs\b.*\b2\b"):
        train(workspace.config("crowded", scaling__num_workers=64))
    assert not run_exists(str(workspace.folder / "runs" / "crowded"))


def test_worker_input_error_is_not_retried(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = tmp_path / "starts"

    def refuse(payload: dict[str, object]) -> None:
        with starts.open("a") as file:
            file.write("x")
        raise ConfigError("train.precision=fp16 does not work on this device")

    monkeypatch.setattr(driver, "train_worker", refuse)
    config = workspace.config("refused", scaling__num_workers=1)
    assert config.scaling.max_failures > 0
    with pytest.raises(ConfigError, match=r"train\.precision=fp16"):
        train(config)
    assert starts.read_text() == "x"
    assert read_run(str(workspace.folder / "runs" / "refused")).status == "FAILED"


def test_killed_controller_ends_the_run_as_failed(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's controller is killed while a worker trains; the record was removed before."""
    started = tmp_path / "started"

    def train_for_ever(payload: dict[str, object]) -> None:
        started.touch()
        time.sleep(300)

    monkeypatch.setattr(driver, "train_worker", train_for_ever)
    config = workspace.config("orphan", scaling__num_workers=1)
    folder = workspace.folder / "runs" / "orphan"

    def kill_the_controller() -> None:
        while not started.exists():
            time.sleep(0.05)
        (folder / FILE).unlink()
        processes = psutil.Process().children(recursive=True)
        (controller,) = [p for p in processes if CONTROLLER_TITLE in "".join(p.cmdline()[:1])]
        controller.kill()

    killer = threading.Thread(target=kill_the_controller)
    killer.start()
    with pytest.raises(PipelineError, match="--resume"):
        train(config)
    killer.join()
    record = read_run(str(folder))
    assert record.status == "FAILED"
    run = mlflow.MlflowClient(workspace.tracking_uri).get_run(record.run_id or "")
    assert (run.info.status, run.data.tags["run_status"]) == ("FAILED", "FAILED")
