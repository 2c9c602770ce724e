"""The record and the evaluations follow the reports."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.evaluations import row, writer_of

from pipeline.launch import recording
from pipeline.launch.recording import RecordCallback
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.record import FILE, RunRecord, read_run
from pipeline.training.saving import NO_AP, SCORE, STOPPED
from pipeline.training.stopping import ControlChannel

UNSCORED = {SCORE: NO_AP, "epoch": 1, "global_step": 5}


class Run:
    """A run whose checkpoints Ray reports; the folders are there as Ray has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        record = RunRecord("run", self.folder, {"seed": 3}, "id")
        self.callback = RecordCallback(record, writer_of(ControlChannel(self.folder)))

    def report(self, name: str, metrics: dict[str, Any]) -> RunRecord:
        Path(self.folder, name).mkdir(exist_ok=True)
        self.callback.after_report(None, [metrics, {}], SimpleNamespace(path=f"{self.folder}/{name}"))
        return read_run(self.folder)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_after_report_updates_last_and_keeps_best(run: Run) -> None:
    for step, ap in {1: 0.2, 2: 0.5, 4: 0.4}.items():
        run.report(f"checkpoint_{step}", {**row(step, ap).metrics, "perf/x": float(step)})
    record = run.report("checkpoint_5", {**UNSCORED, "perf/x": 5.0})
    assert (record.last, record.best) == (f"{run.folder}/checkpoint_5", f"{run.folder}/checkpoint_2")
    assert record.metrics == {SCORE: 0.5, "val/AP50": 1.0, "perf/x": 5.0}
    assert read_evaluations(run.folder) == [row(1, 0.2), row(2, 0.5), row(4, 0.4)]
    later = run.report("checkpoint_6", row(6, 0.5).metrics)
    assert later.best == f"{run.folder}/checkpoint_6"  # the later one of equals, as Ray keeps it


def test_after_report_stop_reason_is_set_and_cleared(run: Run) -> None:
    assert run.report("a", {**UNSCORED, STOPPED: "SIGTERM"}).stopped == "SIGTERM"
    assert run.report("b", UNSCORED).stopped == ""


def test_after_report_writes_a_record_that_was_removed_again(run: Run) -> None:
    for name in ("checkpoint_1", "checkpoint_2"):
        record = run.report(name, UNSCORED)
        assert (record.config, record.run_id, record.last) == ({"seed": 3}, "id", f"{run.folder}/{name}")
        (Path(run.folder) / FILE).unlink()


def test_after_report_full_disk_is_a_warning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.report("checkpoint_1", row(1).metrics)
    run.callback.after_report(None, [row(9, 0.9).metrics], None)  # a report without a checkpoint

    def full(record: RunRecord) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(recording, "write_run", full)
    assert run.report("checkpoint_2", row(2).metrics).last == f"{run.folder}/checkpoint_1"
