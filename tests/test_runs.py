"""The record of a run: found by folder, file, name or URL, never half-written, and clear where it is not there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.runs import FILE, RunRecord, read_run, run_exists, write_run


def record(folder: object, **fields: object) -> RunRecord:
    return replace(RunRecord("first", str(folder), {"seed": 1}, "abc"), **fields)  # type: ignore[arg-type]


def test_found_by_folder_file_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "first"
    written = record(folder, status="FINISHED", last="/c/2", best="/c/1", metrics={"val/AP": 0.5})
    write_run(written)
    for name in (str(folder), f"{folder}/", str(folder / FILE), "runs/first", "runs/first/run.json", "first"):
        assert read_run(name) == written
    assert run_exists(str(folder))
    assert not run_exists(str(tmp_path))


def test_lives_on_any_filesystem() -> None:
    written = record("memory://bucket/runs/first")
    assert not run_exists(written.folder)
    write_run(written)
    assert read_run("memory://bucket/runs/first") == written
    assert read_run("memory://bucket/runs/first/run.json") == written


def test_writing_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for status in ("RUNNING", "FAILED", "RUNNING", "FINISHED"):
        write_run(record(tmp_path, status=status))
    assert read_run(str(tmp_path)).status == "FINISHED"
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_best_checkpoint_is_preferred_to_the_last(tmp_path: Path) -> None:
    assert record(tmp_path, last="/c/2", best="/c/1").checkpoint == "/c/1"
    assert record(tmp_path, last="/c/2").checkpoint == "/c/2"
    with pytest.raises(RunError, match="run first has no checkpoint yet"):
        _ = record(tmp_path).checkpoint


def test_a_run_that_is_not_there_names_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"there is no run 'fifth' .*; runs in runs: none$"):
        read_run("fifth")
    for name in ("second", "first"):
        write_run(record(tmp_path / "runs" / name))
    with pytest.raises(RunError, match=r"there is no run 'fifth' \(no fifth/run\.json\); runs in runs: first, second$"):
        read_run("fifth")
    with pytest.raises(RunError, match=r"; runs in .*/runs: first, second$"):
        read_run(str(tmp_path / "runs" / "third"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a run record"),
        ("[]", "is not a run record"),
        ('{"name": "x"}', "is not a run record"),
        (json.dumps({"version": 1, "name": "x"}), "is not a run record"),
        (json.dumps({"version": 1, "name": "x", "folder": "y", "config": {}, "surprise": 1}), "is not a run record"),
        (json.dumps({"version": 99}), "has version 99, this code reads 1"),
    ],
)
def test_foreign_and_future_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RunError, match=message) as raised:
        read_run(str(tmp_path))
    assert raised.value.exit_code == 2
