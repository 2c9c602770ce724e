"""The home of AP: rows and their file, who writes it, and what the others take from it."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.evaluations import entry, row, writer_of

from pipeline.errors import RunError
from pipeline.runs.evaluations import (
    FILE,
    from_report,
    outcome,
    read_evaluations,
    read_history,
    store,
    write_evaluations,
)
from pipeline.training.stopping import ControlChannel

DAMAGED = ["", "{", "[]", '{"version": 9}', '{"version": 1, "evaluations": [{}]}']


@settings(deadline=None)  # files on a busy machine
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), max_size=8))
def test_write_rows_come_back_by_step_and_the_last_one_of_a_step(
    tmp_path_factory: pytest.TempPathFactory, given: list[tuple[int, float]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    write_evaluations(f"local://{folder}", [row(float(step), ap) for step, ap in given])
    found = read_evaluations(str(folder))
    assert [(each.entry["step"], each.entry["AP"]) for each in found] == sorted(dict(given).items())
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_read_without_a_file_is_empty(tmp_path: Path) -> None:
    assert read_evaluations(str(tmp_path)) == []


@pytest.mark.parametrize("content", DAMAGED)
def test_read_damaged_file_is_an_error_that_names_it(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(RunError, match=FILE):
        read_evaluations(str(tmp_path))
    assert read_history(str(tmp_path), 100) == ()  # for people
    assert f"{FILE} is damaged" in caplog.text


def test_history_ends_at_the_step_that_a_run_goes_on_from(tmp_path: Path) -> None:
    write_evaluations(str(tmp_path), [row(10), row(20), row(40)])
    assert [each["step"] for each in read_history(str(tmp_path), 30)] == [10, 20]  # 40 will come again


def test_a_report_of_ray_carries_a_row() -> None:
    report = {**row(10).metrics, "epoch": 1, "global_step": 10, "perf/images_per_s": 3.0}
    assert from_report("checkpoint_10", report) == row(10)
    assert from_report("checkpoint_11", {"val/AP": -1.0, "global_step": 11}) is None


def test_the_writer_keeps_what_is_there_and_says_the_new(tmp_path: Path) -> None:
    write_evaluations(str(tmp_path), [row(10), row(20, 0.1)])
    control = ControlChannel(str(tmp_path))
    for each in (row(30), row(20, 0.3)):
        store(writer_of(control), each)
    assert read_evaluations(str(tmp_path)) == [row(10), row(20, 0.3), row(30)]
    assert control.drain_progress()[0] == [outcome(entry(30)), outcome(entry(20, 0.3))]


def test_store_to_a_file_that_cannot_be_written_comes_with_the_next_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged file is not written over either: it may hold the AP of a week."""
    control = ControlChannel(str(tmp_path))
    (tmp_path / FILE).write_text("{")
    store(writer_of(control), row(10))
    assert "checkpoint_10 is not in evaluations.json yet" in caplog.text
    assert (tmp_path / FILE).read_text() == "{"
    (tmp_path / FILE).unlink()
    store(writer_of(control), row(20))
    assert read_evaluations(str(tmp_path)) == [row(10), row(20)]


def test_version_0_1_reads_the_same_file(tmp_path: Path) -> None:
    document = {"version": 1, "evaluations": [{"checkpoint": "checkpoint_10", "entry": entry(10)}]}
    (tmp_path / FILE).write_text(json.dumps(document))
    assert read_evaluations(str(tmp_path)) == [row(10)]
    write_evaluations(str(tmp_path), [row(10)])
    assert json.loads((tmp_path / FILE).read_text()) == document


def test_people_count_epochs_from_one() -> None:
    assert outcome(entry(10, 0.25)) == "epoch 1 evaluated: AP 0.2500  AP50 0.5000"
