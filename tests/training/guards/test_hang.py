"""A process that hangs ends and writes its stacks; one that does not hang, or only during an evaluation, continues."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

PROGRAM = """
import sys, time
from pathlib import Path
from pipeline.training.guards import hang
hang._FLUSH_SECONDS = 0.2
detector = hang.HangDetector({seconds}, 3, Path({folder!r}))
def waits_for_ever():
    time.sleep(600)
def step(seconds):
    time.sleep(seconds)
    detector.rearm()
with detector.watch():
    {body}
print("done", flush=True)
"""


def run(folder: Path, body: str, seconds: float = 1.0) -> subprocess.CompletedProcess[str]:
    code = PROGRAM.format(folder=str(folder), body=body, seconds=seconds)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_hang_detector_hanging_step_writes_stacks_and_ends(tmp_path: Path) -> None:
    done = run(tmp_path, "step(0.1); waits_for_ever()")
    assert done.returncode == 1
    assert "done" not in done.stdout
    for text in (done.stderr, (tmp_path / "hang_rank3.txt").read_text()):
        assert "rank 3: no step was finished" in text
        assert "train.hang_minutes" in text
        assert "in waits_for_ever" in text


def test_hang_detector_blocked_interpreter_ends_by_backstop(tmp_path: Path) -> None:
    """As an extension that keeps the interpreter's lock: the detector's own thread cannot report then."""
    body = "hang._BACKSTOP_SECONDS = 0.5; detector.rearm(); import ctypes; ctypes.PyDLL(None).sleep(600)"
    done = run(tmp_path, body)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "<module>" in done.stderr


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ("[step(0.3) for _ in range(8)]", 2.0),  # longer in all than the limit, each step is not
        ("exec('with detector.pause(): time.sleep(2.5)'); step(0.1)", 1.0),  # an evaluation
        ("time.sleep(1)", 0.0),  # switched off
    ],
)
def test_hang_detector_without_hang_reports_nothing(tmp_path: Path, body: str, seconds: float) -> None:
    done = run(tmp_path, body, seconds)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
    assert not list(tmp_path.iterdir())


def test_hang_detector_hang_after_pause_is_reported(tmp_path: Path) -> None:
    done = run(tmp_path, "exec('with detector.pause(): time.sleep(1.5)'); waits_for_ever()")
    assert done.returncode == 1
    assert "in waits_for_ever" in done.stderr


def test_hang_detector_after_an_error_stops_watching(tmp_path: Path) -> None:
    done = run(tmp_path, "raise SystemExit(5)")
    assert done.returncode == 5
    assert not list(tmp_path.iterdir())
