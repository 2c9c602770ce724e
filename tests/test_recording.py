"""The record follows the reports."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.evaluation.coco import METRICS
from pipeline.runs import FILE, RunRecord, read_run
from pipeline.training import recording
from pipeline.training.evaluations import Evaluation, add_evaluation
from pipeline.training.recording import RecordCallback, updated
from pipeline.training.saving import NO_AP, SCORE, STOPPED

RECORD = RunRecord("run", "s3://bucket/run", {})


def metrics(ap: float, **others: Any) -> dict[str, Any]:
    return {SCORE: ap, "epoch": 1, **others}


def test_last_follows_and_best_stays_with_the_highest_ap() -> None:
    record = RECORD
    for name, ap in {"a": 0.2, "b": 0.5, "c": NO_AP, "d": 0.4}.items():
        record = updated(record, name, metrics(ap))
    assert (record.last, record.best) == ("s3://bucket/run/d", "s3://bucket/run/b")
    assert record.metrics == {SCORE: 0.5}
    assert updated(record, "e", metrics(0.5)).best == "s3://bucket/run/e"  # the later one of equals, as Ray keeps it


def test_a_score_that_comes_later_makes_the_best(tmp_path: Path) -> None:
    """An evaluation task ends after the report of its checkpoint; Ray calls nobody, so the next report tells."""
    folder = str(tmp_path)
    callback = RecordCallback(RunRecord("run", folder, {}))
    for name in ("a", "b"):
        callback.after_report(None, [metrics(NO_AP, **{"perf/x": 1.0})], SimpleNamespace(path=f"{folder}/{name}"))
    assert read_run(folder).best is None
    for name, step, ap in (("a", 1.0, 0.4), ("b", 2.0, 0.3), ("of an earlier start", 0.0, 0.9)):
        entry = {"epoch": 0.0, "step": step, **dict.fromkeys(METRICS, 0.0), "AP": ap}
        add_evaluation(folder, Evaluation(name, entry))
    callback.after_report(None, [metrics(NO_AP)], SimpleNamespace(path=f"{folder}/c"))
    record = read_run(folder)
    assert (record.best, record.last) == (f"{folder}/a", f"{folder}/c")
    assert record.metrics == {"perf/x": 1.0, **{f"val/{key}": 0.4 if key == "AP" else 0.0 for key in METRICS}}


def test_why_a_run_left_is_noted_and_forgotten() -> None:
    left = updated(RECORD, "a", metrics(NO_AP, **{STOPPED: "SIGTERM"}))
    assert left.stopped == "SIGTERM"
    assert updated(left, "b", metrics(NO_AP)).stopped == ""


def test_after_report_writes_a_record_that_was_removed_again(tmp_path: Path) -> None:
    callback = RecordCallback(RunRecord("run", str(tmp_path), {"seed": 3}, "id"))
    for name in ("checkpoint_1", "checkpoint_2"):
        callback.after_report(None, [metrics(0.1)], SimpleNamespace(path=f"{tmp_path}/{name}"))
        record = read_run(str(tmp_path))
        assert (record.config, record.run_id, record.last) == ({"seed": 3}, "id", f"{tmp_path}/{name}")
        (tmp_path / FILE).unlink()


def test_the_callback_writes_and_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = RecordCallback(RunRecord("run", str(tmp_path), {"seed": 3}, "id"))
    callback.after_report(None, [metrics(0.1)], SimpleNamespace(path=f"{tmp_path}/checkpoint_1"))
    callback.after_report(None, [metrics(0.9)], None)
    assert read_run(str(tmp_path)).last == f"{tmp_path}/checkpoint_1"

    def full(record: RunRecord) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(recording, "write_run", full)
    callback.after_report(None, [metrics(0.2)], SimpleNamespace(path=f"{tmp_path}/checkpoint_2"))
    assert read_run(str(tmp_path)).last == f"{tmp_path}/checkpoint_1"
