"""benchmarks/evaluation.py compares all evaluators that are installed, and sees a difference."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evaluation import build_parser, difference, run
from benchmarks.evaluation_peers import OWN, evaluators
from jobs.cli import main


@pytest.mark.slow
def test_benchmark_measures_each_evaluator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.json"
    arguments = ["--images", "20", "--top-k", "100", "300", "--rounds", "1", "--json", str(path)]
    assert main(build_parser(), run, arguments) == 0
    rows = json.loads(path.read_text())
    assert {(row["evaluator"], row["top_k"]) for row in rows} == {(n, k) for n in evaluators() for k in (100, 300)}
    printed = capsys.readouterr().out
    for row in rows:
        assert row["evaluator"] in printed
        assert row["processor_s"] > 0
        if row["evaluator"] == "pycocotools" or row["evaluator"].startswith(OWN):
            assert row["equal"] == "equal"


def test_difference_names_the_array_and_its_distance(tmp_path: Path) -> None:
    arrays = {key: np.zeros((2, 2)) for key in ("precision", "recall", "scores")}
    np.savez(tmp_path / "pycocotools.npz", **arrays)
    np.savez(tmp_path / "other.npz", **arrays | {"recall": np.full((2, 2), 1e-9)})
    assert difference("pycocotools", tmp_path) == "equal"
    assert difference("other", tmp_path) == "recall by 1.0e-09"
