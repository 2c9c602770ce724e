"""What rank 0 learns of evaluation tasks, and when it says that they do not keep up."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.checkpoint import TrainState
from pipeline.training import task_evaluations
from pipeline.training.evaluations import Evaluation, add_evaluation
from pipeline.training.task_evaluations import BACKLOG, TaskEvaluations

STATE = TrainState({}, (), "digest", 1, 0, 4, 4)


def at(step: int) -> TrainState:
    return replace(STATE, global_step=step)


def row(step: float, ap: float) -> Evaluation:
    return Evaluation(f"checkpoint_{step:.0f}", {"epoch": 0.0, "step": step, "AP": ap})


def test_the_state_takes_over_what_tasks_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_evaluations, "LOOK_SECONDS", 0.0)
    listed: list[int] = []
    saver = SimpleNamespace(refresh=lambda: listed.append(1))
    tasks = TaskEvaluations(str(tmp_path), saver)  # type: ignore[arg-type]
    assert tasks.taken(STATE) is STATE  # nothing yet
    add_evaluation(str(tmp_path), row(4.0, 0.3))
    add_evaluation(str(tmp_path), row(8.0, 0.9))  # of an earlier start that came further: it will come again
    state = tasks.taken(STATE)
    assert state.metrics == {"AP": 0.3}
    assert [entry["step"] for entry in state.history] == [4.0]
    assert not listed  # Ray removes a checkpoint only after it was told the score
    assert tasks.taken(state) is state
    assert listed == [1]
    assert tasks.taken(state) is state
    assert listed == [1]


def test_looks_are_some_seconds_apart(tmp_path: Path) -> None:
    tasks = TaskEvaluations(str(tmp_path), SimpleNamespace(refresh=lambda: None))  # type: ignore[arg-type]
    tasks.taken(STATE)
    add_evaluation(str(tmp_path), row(4.0, 0.3))
    assert tasks.taken(STATE) is STATE


def test_evaluations_that_pile_up_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tasks = TaskEvaluations("", SimpleNamespace())  # type: ignore[arg-type]
    done = ({"step": 1.0, "AP": 0.1},)
    for step in range(1, BACKLOG + 1):
        tasks.sent(replace(at(step), history=done))
    assert not caplog.records  # the first is done
    for step in range(BACKLOG + 1, BACKLOG + 4):
        tasks.sent(replace(at(step), history=done))
    assert len(caplog.records) == 1
    assert "evaluation.where=inline" in caplog.text
