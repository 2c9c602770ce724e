"""The record follows the reports."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.runs import RunRecord, read_run, write_run
from pipeline.training import recording
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


def test_why_a_run_left_is_noted_and_forgotten() -> None:
    left = updated(RECORD, "a", metrics(NO_AP, **{STOPPED: "SIGTERM"}))
    assert left.stopped == "SIGTERM"
    assert updated(left, "b", metrics(NO_AP)).stopped == ""


def test_the_callback_writes_and_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(RunRecord("run", str(tmp_path), {}))
    callback = RecordCallback(str(tmp_path))
    callback.after_report(None, [metrics(0.1)], SimpleNamespace(path=f"{tmp_path}/checkpoint_1"))
    callback.after_report(None, [metrics(0.9)], None)
    assert read_run(str(tmp_path)).last == f"{tmp_path}/checkpoint_1"

    def full(record: RunRecord) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(recording, "write_run", full)
    callback.after_report(None, [metrics(0.2)], SimpleNamespace(path=f"{tmp_path}/checkpoint_2"))
    assert read_run(str(tmp_path)).last == f"{tmp_path}/checkpoint_1"
