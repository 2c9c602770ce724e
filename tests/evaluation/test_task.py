"""The supervisor: a failing evaluation task never ends the training. Real tasks are in integration/."""

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
from pipeline.evaluation.task import Validator, has_stopped, supervise
from pipeline.runs.evaluations import Evaluation, read_evaluations
from pipeline.runs.record import RunRecord, write_run
from pipeline.training.stopping import ControlChannel

FOUND = {"epoch": 0.0, "step": 4.0, "AP": 0.5, "AP50": 0.6}


class FakeTask:
    """Ends after some polls with a result or an error."""

    def __init__(self, polls: int, end: dict[str, float] | BaseException) -> None:
        self.polls = polls
        self.end = end
        self.cancelled = False

    def wait(self, seconds: float) -> bool:
        assert seconds > 0
        self.polls -= 1
        return self.polls < 0

    def result(self) -> dict[str, float]:
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end

    def cancel(self) -> None:
        self.cancelled = True


def no() -> bool:
    return False


def test_supervise_returns_the_result() -> None:
    assert supervise(lambda: FakeTask(3, FOUND), "checkpoint_1", no) == FOUND


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (WorkerCrashedError(), "died unexpectedly"),
        (RayTaskError("evaluate", "a long traceback", CheckpointError("the disk is full")), "AP: the disk is full"),
        (ValueError(), r"ValueError\(\)"),
    ],
)
def test_supervise_failing_task_is_a_warning(error: Exception, said: str, caplog: pytest.LogCaptureFixture) -> None:
    assert supervise(lambda: FakeTask(0, error), "checkpoint_1", no) is None
    assert "checkpoint_1 could not be evaluated, training continues" in caplog.text
    assert "long traceback" not in caplog.text
    caplog.clear()

    def start() -> FakeTask:
        raise error

    assert supervise(start, "checkpoint_1", no) is None
    assert len(caplog.records) == 1
    assert re.search(said, caplog.text)


@pytest.mark.parametrize("polls", [1, 5])
def test_supervise_stopped_run_cancels_the_task(polls: int) -> None:
    """Ray restarts evaluations that ended with this error when the run continues."""
    task = FakeTask(polls, FOUND)
    with pytest.raises(TaskCancelledError):
        supervise(lambda: task, "checkpoint_1", lambda: True)
    assert task.cancelled
    assert task.polls == polls - 1


@pytest.mark.parametrize("end", [FOUND, CheckpointError("the disk is full")])
def test_validator_writes_the_row_before_it_returns(
    end: dict[str, float] | Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "EvaluationTask", lambda *_: FakeTask(0, end))
    validator = Validator({}, str(tmp_path), None, writer_of(ControlChannel(str(tmp_path))))
    found = validator(SimpleNamespace(path="bucket/run/checkpoint_1"))  # type: ignore[arg-type]
    row = Evaluation("checkpoint_1", FOUND)
    assert (found, read_evaluations(str(tmp_path))) == ((row.metrics, [row]) if end is FOUND else ({}, []))


def test_supervise_cancelled_task_raises() -> None:
    with pytest.raises(TaskCancelledError):
        supervise(lambda: FakeTask(0, TaskCancelledError()), "checkpoint_1", no)


def test_has_stopped_follows_the_record(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    assert not has_stopped(folder)  # there is no record
    write_run(RunRecord("run", folder, {}))
    assert not has_stopped(folder)
    write_run(RunRecord("run", folder, {}, stopped="SIGTERM"))
    assert has_stopped(folder)


def test_task_module_imports_no_torch() -> None:
    code = "import sys, pipeline.evaluation.task; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
