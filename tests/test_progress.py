"""Progress is a bar on a terminal and plain lines elsewhere, never on standard output."""

import sys

import pytest

from pipeline import progress
from pipeline.progress import Progress


def test_progress_without_terminal_prints_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    with Progress(3, "writing", "shard") as bar:
        bar.advance()
        bar.advance(2)
    seen = capsys.readouterr()
    assert seen.err.splitlines() == ["writing: 1 of 3 shards", "writing: 3 of 3 shards"]
    assert seen.out == ""


def test_progress_rate_is_in_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([100.0, 120.0, 120.0, 120.0, 130.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress(1000, "evaluation", "image", rate=True) as bar:
        bar.advance(5)  # what comes before, such as loading a model, does not count
        bar.advance(25)
    lines = ["evaluation: 5 of 1,000 images", "evaluation: 30 of 1,000 images, 2.5 images/s"]
    assert capsys.readouterr().err.splitlines() == lines


def test_progress_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, "writing", "shard") as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def test_progress_on_terminal_shows_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(3, "writing", "shard") as bar:
        bar.advance(3)
    seen = capsys.readouterr()
    assert "writing" in seen.err
    assert "3/3" in seen.err or "0/3" in seen.err
    assert seen.out == ""
