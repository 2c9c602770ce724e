"""Rank 0's view of evaluation tasks, and the warning when they do not keep up."""

from pathlib import Path

import pytest

from pipeline.runs.evaluations import Evaluation, write_evaluations
from pipeline.training import task_evaluations
from pipeline.training.task_evaluations import BACKLOG_EVALUATIONS, TaskEvaluations


def row(step: float, ap: float) -> Evaluation:
    return Evaluation(f"checkpoint_{step:.0f}", {"epoch": 0.0, "step": step, "AP": ap})


def test_merge_new_results_gives_rows_up_to_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_evaluations, "POLL_SECONDS", 0.0)
    tasks = TaskEvaluations(str(tmp_path))
    assert tasks.merge_new_results((), 4) == ()
    rows = [row(4.0, 0.3), row(8.0, 0.9)]  # one is of an earlier start that came further: it will come again
    write_evaluations(str(tmp_path), rows)
    assert tasks.merge_new_results((), 4) == (rows[0].entry,)


def test_merge_new_results_right_after_a_read_gives_known(tmp_path: Path) -> None:
    tasks = TaskEvaluations(str(tmp_path))
    tasks.merge_new_results((), 4)
    write_evaluations(str(tmp_path), [row(4.0, 0.3)])
    assert tasks.merge_new_results((), 4) == ()


def test_note_submitted_backlog_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    tasks = TaskEvaluations("")
    done = ({"step": 1.0, "AP": 0.1},)
    for step in range(1, BACKLOG_EVALUATIONS + 1):
        tasks.note_submitted(done, step)
    assert not caplog.records  # the first is done
    for step in range(BACKLOG_EVALUATIONS + 1, BACKLOG_EVALUATIONS + 4):
        tasks.note_submitted(done, step)
    assert len(caplog.records) == 1
    assert "evaluation.where=inline" in caplog.text
