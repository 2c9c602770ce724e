"""The watchman: whatever becomes of an evaluation task, training goes on. Real tasks are in integration/."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError, TaskCancelledError, WorkerCrashedError
from support.evaluations import writer_of
from support.paths import ROOT

from pipeline.errors import CheckpointError
from pipeline.evaluation import task
from pipeline.evaluation.task import Validator, is_leaving, watch
from pipeline.runs.evaluations import Evaluation, read_evaluations
from pipeline.runs.record import RunRecord, write_run
from pipeline.training.stopping import ControlChannel

FOUND = {"epoch": 0.0, "step": 4.0, "AP": 0.5, "AP50": 0.6}


class FakeTask:
    """Ends after some looks with a result or an error."""

    def __init__(self, looks: int, end: dict[str, float] | BaseException) -> None:
        self.looks = looks
        self.end = end
        self.cancelled = False

    def wait(self, seconds: float) -> bool:
        assert seconds > 0
        self.looks -= 1
        return self.looks < 0

    def result(self) -> dict[str, float]:
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end

    def cancel(self) -> None:
        self.cancelled = True


def no() -> bool:
    return False


def test_the_result_is_passed_on() -> None:
    assert watch(lambda: FakeTask(3, FOUND), "checkpoint_1", no) == FOUND


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (WorkerCrashedError(), "died unexpectedly"),
        (RayTaskError("evaluate", "a long traceback", CheckpointError("the disk is full")), "AP: the disk is full"),
        (ValueError(), r"ValueError\(\)"),
    ],
)
def test_a_task_that_fails_is_a_warning(error: Exception, said: str, caplog: pytest.LogCaptureFixture) -> None:
    assert watch(lambda: FakeTask(0, error), "checkpoint_1", no) is None
    assert "checkpoint_1 could not be evaluated, training goes on" in caplog.text
    assert "long traceback" not in caplog.text
    caplog.clear()

    def start() -> FakeTask:
        raise error

    assert watch(start, "checkpoint_1", no) is None
    assert len(caplog.records) == 1
    assert re.search(said, caplog.text)


@pytest.mark.parametrize("looks", [1, 5])
def test_a_run_that_leaves_waits_for_nothing(looks: int) -> None:
    """Ray begins again what ended with this error, when the run goes on."""
    task = FakeTask(looks, FOUND)
    with pytest.raises(TaskCancelledError):
        watch(lambda: task, "checkpoint_1", lambda: True)
    assert task.cancelled
    assert task.looks == looks - 1


@pytest.mark.parametrize("end", [FOUND, CheckpointError("the disk is full")])
def test_the_row_is_written_before_ray_learns_the_result(
    end: dict[str, float] | Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "EvaluationTask", lambda *_: FakeTask(0, end))
    validator = Validator({}, str(tmp_path), None, writer_of(ControlChannel(str(tmp_path))))
    found = validator(SimpleNamespace(path="bucket/run/checkpoint_1"))  # type: ignore[arg-type]
    row = Evaluation("checkpoint_1", FOUND)
    assert (found, read_evaluations(str(tmp_path))) == ((row.metrics, [row]) if end is FOUND else ({}, []))


def test_a_task_cancelled_from_outside_is_left_to_ray() -> None:
    with pytest.raises(TaskCancelledError):
        watch(lambda: FakeTask(0, TaskCancelledError()), "checkpoint_1", no)


def test_leaving_is_what_the_record_says(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    assert not is_leaving(folder)  # there is no record
    write_run(RunRecord("run", folder, {}))
    assert not is_leaving(folder)
    write_run(RunRecord("run", folder, {}, stopped="SIGTERM"))
    assert is_leaving(folder)


def test_the_watchman_needs_no_torch() -> None:
    code = "import sys, pipeline.evaluation.task; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
