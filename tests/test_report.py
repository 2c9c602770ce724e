"""Plots and per-category AP from one evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.coco import coco_scores
from pipeline.evaluation.detections import from_results_json
from pipeline.evaluation.report import convergence_plot, per_category_ap, precision_recall_plot

ASSETS = Path(__file__).parent / "assets" / "coco_small"


def test_category_ap_averages_to_ap_and_plots_are_drawn(tmp_path: Path) -> None:
    files = sorted(ASSETS.glob("*.json"))
    truth = json.loads(next(f for f in files if "annotations" in f.name).read_text())
    scores = coco_scores(truth, from_results_json(next(f for f in files if "results" in f.name)))
    known = [ap for ap in per_category_ap(scores).values() if ap > -1]
    assert np.mean(known) == pytest.approx(scores.metrics["AP"], abs=1e-12)
    precision_recall_plot(scores, tmp_path / "pr.png")
    entry = {"epoch": 0.0, **scores.metrics}
    convergence_plot([entry, {**entry, "epoch": 1.0, "AP": -1.0}], tmp_path / "convergence.png")
    for name in ("pr.png", "convergence.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(set(picture.convert("L").tobytes())) > 10
