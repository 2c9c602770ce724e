"""One line per step, also after new epochs, kills, and resumes from any checkpoint."""

import json
import math
from pathlib import Path

import numpy as np
import pandas
import pytest

from pipeline.files.atomic import temporary_name
from pipeline.training.monitoring import steplog
from pipeline.training.monitoring.steplog import FOLDER, MEDIAN_EPOCHS, StepLog, read_epoch_seconds

PER_EPOCH = 4


def run(folder: str, start: int, stop: int, flushed: int | None = None) -> StepLog:
    """Steps `start`+1 to `stop`, as after a resume at `start`; what comes after step `flushed` is lost."""
    log = StepLog(folder, start // PER_EPOCH, start)
    for step in range(start + 1, stop + 1):
        log.add((step - 1) // PER_EPOCH, step, {"loss": 1 / 3, "start": start})
        if step == (stop if flushed is None else flushed):
            log.flush()
    return log


def lines(folder: Path) -> list[dict[str, float]]:
    files = sorted((folder / FOLDER).glob("*.jsonl"))
    return [json.loads(line, parse_constant=refuse) for file in files for line in file.read_text().splitlines()]


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


@pytest.mark.parametrize("resumed", range(10))
def test_steplog_resumed_run_has_every_step_once(tmp_path: Path, resumed: int) -> None:
    run(f"local://{tmp_path}", 0, 9)
    run(f"local://{tmp_path}", resumed, 11)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, 12))
    assert [line["epoch"] for line in found] == [(step - 1) // PER_EPOCH for step in range(1, 12)]
    assert [line["start"] for line in found] == [0] * resumed + [resumed] * (11 - resumed)


def test_steplog_unflushed_steps_are_written_again(tmp_path: Path) -> None:
    run(str(tmp_path), 0, 7, flushed=6)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 7))
    run(str(tmp_path), 6, 8)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


def test_steplog_rounds_floats_only(tmp_path: Path) -> None:
    log = StepLog(str(tmp_path), 0, 0)
    log.add(0, 1, {"loss": 1 / 3, "applied": False, "norm": 2e30})
    log.flush()
    assert lines(tmp_path) == [{"step": 1, "epoch": 0, "loss": 0.3333333, "applied": False, "norm": 2e30}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_steplog_non_finite_number_becomes_null(tmp_path: Path, value: float) -> None:
    log = StepLog(str(tmp_path), 0, 0)
    log.add(0, 1, {"loss": value})
    log.flush()
    assert lines(tmp_path) == [{"step": 1, "epoch": 0, "loss": None}]
    run(str(tmp_path), 1, 2)
    assert [line["loss"] for line in lines(tmp_path)] == [None, 0.3333333]
    assert pandas.read_json(tmp_path / FOLDER / "epoch_000.jsonl", lines=True).loss.dtype == float


def test_steplog_file_of_version_0_1_with_nan_becomes_json(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "epoch_000.jsonl").write_text('{"step": 1, "epoch": 0, "loss": NaN, "norm": -Infinity}\n')
    run(str(tmp_path), 1, 2)
    assert lines(tmp_path)[0] == {"step": 1, "epoch": 0, "loss": None, "norm": None}
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_steplog_killed_while_it_loads_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(str(tmp_path), 0, 7)
    left = []

    def killed(path: str, content: bytes) -> None:
        left.append(len(lines(tmp_path)))
        raise KeyboardInterrupt

    monkeypatch.setattr(steplog, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        run(str(tmp_path), 6, 8)
    assert left == [7]


def test_steplog_interval_passed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = StepLog(str(tmp_path), 0, 0)
    log.add(0, 1, {})
    assert lines(tmp_path) == []
    monkeypatch.setattr(steplog, "INTERVAL_SECONDS", 0.0)
    log.add(0, 2, {})
    assert len(lines(tmp_path)) == 2


def test_steplog_unwritable_folder_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    run(str(tmp_path), 0, 9)
    assert len(caplog.records) == 1
    assert "training continues" in caplog.text


def test_steplog_killed_while_it_writes_leaves_no_second_file(tmp_path: Path) -> None:
    run(str(tmp_path), 0, 6)
    (tmp_path / FOLDER / temporary_name("epoch_001.jsonl")).write_text('{"step": 5, "epoch"')
    run(str(tmp_path), 4, 8)
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, 9)]
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["epoch_000.jsonl", "epoch_001.jsonl"]


def test_read_epoch_seconds_is_the_median_of_the_last_whole_epochs(tmp_path: Path) -> None:
    assert read_epoch_seconds(str(tmp_path), 3) is None
    log = StepLog(str(tmp_path), 0, 0)
    epochs = MEDIAN_EPOCHS + 2
    for step in range(PER_EPOCH * epochs + 1):  # and one step of the next epoch
        epoch = step // PER_EPOCH
        log.add(epoch, step + 1, {"seconds": 100.0 if epoch == 0 else float(epoch)})
    log.flush()
    last = sorted(PER_EPOCH * epoch for epoch in range(2, epochs))
    assert read_epoch_seconds(str(tmp_path), epochs) == last[len(last) // 2]
    assert read_epoch_seconds(str(tmp_path), 1) == 400.0
    assert read_epoch_seconds(str(tmp_path), epochs + 1) is not None  # without the part of an epoch
    (tmp_path / FOLDER / "epoch_000.jsonl").write_text("{}\n")
    assert read_epoch_seconds(str(tmp_path), 1) is None
