"""A trace holds exactly the requested steps."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from pipeline.training.monitoring import profiling
from pipeline.training.monitoring.profiling import FOLDER, Profiler


class Logger:
    """Takes artifacts by name."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def artifact(self, path: Path, folder: str = "") -> None:
        self.files.append(f"{folder}/{path.name}")


def run(folder: Path, window: tuple[int, int] | None, start: int, stop: int) -> list[str]:
    """Steps `start`+1 to `stop`, each of which is one operation of a kind that is easy to count; what MLflow got."""
    logger = Logger()
    profiler = Profiler(window, str(folder), logger)  # type: ignore[arg-type]
    profiler.after(start)
    for step in range(start + 1, stop + 1):
        torch.ones(step, step).cumsum(0)
        profiler.after(step)
    profiler.close(stop)
    return logger.files


def operations(folder: Path, name: str) -> int:
    with gzip.open(folder / FOLDER / name) as file:
        trace = json.load(file)
    return sum(event.get("name") == "aten::cumsum" for event in trace["traceEvents"])


@pytest.mark.parametrize("window", [(1, 2), (3, 3), (4, 6)])
def test_profiler_traces_exactly_the_window(tmp_path: Path, window: tuple[int, int]) -> None:
    name = f"steps_{window[0]}-{window[1]}.json.gz"
    assert run(tmp_path, window, 0, 8) == [f"profile/{name}"]
    assert operations(tmp_path, name) == window[1] - window[0] + 1


def test_profiler_run_ends_inside_window_stores_partial_trace(tmp_path: Path) -> None:
    assert run(tmp_path, (3, 9), 0, 5) == ["profile/steps_3-5.json.gz"]
    assert operations(tmp_path, "steps_3-5.json.gz") == 3


def test_profiler_outside_the_window_writes_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, None, 0, 5) == []
    assert run(tmp_path, (2, 4), 2, 9) == []  # it resumes inside the window
    assert run(tmp_path, (2, 4), 6, 9) == []
    assert not (tmp_path / FOLDER).exists()


def test_profiler_large_trace_is_not_sent_to_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "MLFLOW_BYTES", 1)
    assert run(tmp_path, (1, 1), 0, 2) == []
    assert operations(tmp_path, "steps_1-1.json.gz") == 1


def test_profiler_unwritable_folder_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    assert run(tmp_path, (1, 2), 0, 4) == []
    assert "the trace of train.profile_steps cannot be written, training continues" in caplog.text
