"""Plots and per-category AP from one evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support.data import with_orientation
from support.paths import ASSETS

from pipeline.data.dataset import DetectionDataset
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic
from pipeline.evaluation.coco import coco_scores
from pipeline.evaluation.detections import Detections, concatenate, from_results_json
from pipeline.evaluation.drawing import class_colour
from pipeline.evaluation.report import (
    category_table,
    convergence_plot,
    draw_first_images,
    per_category_ap,
    precision_recall_plot,
)

ASSETS = ASSETS / "coco_small"


def test_per_category_ap_averages_to_ap(tmp_path: Path) -> None:
    files = sorted(ASSETS.glob("*.json"))
    truth = json.loads(next(f for f in files if "annotations" in f.name).read_text())
    scores = coco_scores(truth, from_results_json(next(f for f in files if "results" in f.name)))
    known = [ap for ap in per_category_ap(scores).values() if ap > -1]
    assert np.mean(known) == pytest.approx(scores.metrics["AP"], abs=1e-12)
    precision_recall_plot(scores, tmp_path / "pr.png")
    entry = {"epoch": 0.0, **scores.metrics}
    convergence_plot([entry, {**entry, "epoch": 1.0, "AP": -1.0}], tmp_path / "convergence.png")
    for name in ("pr.png", "convergence.png"):
        with Image.open(tmp_path / name) as image:
            assert len(set(image.convert("L").tobytes())) > 10


def test_category_table_equal_names_keep_their_rows() -> None:
    truth = {"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}, {"id": 7}, {"id": 9}]}
    scores = coco_scores(truth, concatenate([]))
    scores.arrays.precision[:, :, 0], scores.arrays.precision[:, :, 2] = 0.5, 0.25
    assert category_table(scores, {1: "bolt", 7: "nut", 9: "bolt"}) == [
        {"id": 1, "name": "bolt", "AP": 0.5},
        {"id": 7, "name": "nut", "AP": -1.0},
        {"id": 9, "name": "bolt", "AP": 0.25},
    ]


@pytest.mark.parametrize("epochs", [1, 2, 7, 300])
def test_convergence_plot_axis_has_whole_epochs(epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    scores = {"AP": 0.1, "AP50": 0.2, "AP_small": 0.05}
    convergence_plot([{"epoch": epoch, **scores} for epoch in range(epochs)], tmp_path / "convergence.png")
    ticks = drawn[0].axes[0].get_xticks()
    assert len(ticks)
    assert all(tick == int(tick) for tick in ticks)


def test_draw_first_images_shows_ground_truth_beside_detections(tmp_path: Path) -> None:
    annotations, images = write_synthetic(tmp_path / "raw", images=8, seed=0, size=64)
    build_shards(annotations, images, tmp_path / "shards")
    data = DetectionDataset(str(tmp_path / "shards"), "contiguous")
    rows = np.flatnonzero(data.index.samples.boxes)
    first = int(data.index.samples.image_id[rows[0]])
    found = Detections(
        np.array([first, first]),
        np.array([0, 1], np.int32),
        np.array([1, 3]),
        np.array([[5, 5, 20, 20], [30, 30, 20, 20]], np.float32),
        np.array([0.9, 0.1], np.float32),
    )
    drawn = draw_first_images(found, data, CATEGORIES)
    assert len(drawn) == 4
    image = np.array(drawn[first])
    left, right = image[:, : image.shape[1] // 2], image[:, image.shape[1] // 2 :]
    truth = {each["category_id"] for each in data.read_annotations(int(rows[0]))["annotations"]}
    for category in CATEGORIES:
        assert has_colour(left, category) == (category in truth)
        assert has_colour(right, category) == (category == 1)  # the score of the other one is too low to be shown


def has_colour(image: np.ndarray, category: int) -> bool:
    return bool((image == class_colour(category)).all(-1).sum() > 100)


def test_draw_first_images_are_in_displayed_orientation(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(with_orientation(Image.new("RGB", (800, 640)), 6))
    tree = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 800}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [9, 600, 99, 99], "area": 9801, "iscrowd": 0}
        ],
        "categories": [{"id": 3, "name": "é"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(tree))
    build_shards(tmp_path / "a.json", tmp_path / "images", tmp_path / "shards", exif="apply")
    one = np.ones(1)
    found = Detections(one.astype(int), one.astype(np.int32), 3 * one.astype(int), np.array([[9.0, 600, 99, 99]]), one)
    data = DetectionDataset(str(tmp_path / "shards"))
    image = draw_first_images(found, data, {3: "é"})[1]
    assert image.width > 2 * 640
    for left in (0, image.width - 640):  # ground truth, detections
        assert image.getpixel((left + 9, image.height - 800 + 690)) == class_colour(3)
    assert "exif" not in data.sample(0).image.info  # the predictor does not turn it once more
