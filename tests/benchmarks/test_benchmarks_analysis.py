"""benchmarks/analysis.py runs, and what it draws has every kind of error."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.analysis import build_parser, draw_detections, draw_ground_truth, run
from jobs.cli import main
from pipeline.evaluation.analysis.analyse import analyse


def test_benchmark_prints_and_saves_each_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--images", "20", "--draws", "2", "--json", str(tmp_path / "a.json")]
    assert main(build_parser(), run, arguments) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 5
    printed = capsys.readouterr().out
    for row in rows:
        assert row["what"] in printed
        assert row["processor_s"] > 0


def test_benchmark_data_has_every_cause_of_errors() -> None:
    truth = draw_ground_truth(60, np.random.default_rng(0))
    found = draw_detections(truth, 100, shift=0.1, seed=1)
    assert len(found) == 6000
    assert np.unique(np.stack([found.image_ids, found.orders]), axis=1).shape == (2, 6000)
    result = analyse(truth, found, draws=0)
    assert all(cost.count > 0 for cost in result.errors.costs)
    assert 0.1 < result.metrics["AP50"].value < 0.9
