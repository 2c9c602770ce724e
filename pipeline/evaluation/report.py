"""The report of an evaluation for people: plots, AP per category, images with detections.

It uses matplotlib's file backend only, so no display is needed. A file that cannot be written is an OSError.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from pipeline.data.dataset import DetectionDataset
from pipeline.evaluation.coco import Scores, mean_known
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.drawing import (
    DrawnBox,
    Prediction,
    class_colour,
    draw_boxes,
    draw_detections,
    put_beside,
)

IOUS = {0.50: 0, 0.75: 5, 0.90: 8}  # threshold -> its row in `Scores.precision`
DPI = 120
DRAWN_IMAGES, LOWEST_SCORE = 4, 0.3


def per_category_ap(scores: Scores) -> dict[int, float]:
    """AP by category id; -1 if the ground truth has no object of the category."""
    return {int(category): mean_known(scores.precision[:, :, k]) for k, category in enumerate(scores.category_ids)}


def category_table(scores: Scores, names: Mapping[int, str]) -> list[dict[str, int | str | float]]:
    """A row `{"id", "name", "AP"}` per category, by ascending id; several categories may have one name.

    Args:
        scores: of one evaluation.
        names: of the categories, by id.
    """
    return [{"id": category, "name": names[category], "AP": ap} for category, ap in per_category_ap(scores).items()]


def precision_recall_plot(scores: Scores, path: Path) -> None:
    """Precision over recall, averaged over categories, at three IoU thresholds, as a PNG file."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    for iou, row in IOUS.items():
        curve = [mean_known(scores.precision[row, r]) for r in range(len(scores.recalls))]
        axes.plot(scores.recalls, curve, label=f"IoU {iou:.2f}, AP {mean_known(scores.precision[row]):.3f}")
    axes.set_title(f"AP {scores.metrics['AP']:.3f}", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=DPI)


def convergence_plot(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """AP, AP50 and AP_small over epochs, as a PNG file; `history` has one entry per evaluation."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="epochs", ylabel="COCO AP", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # evaluations end epochs
    epochs = [entry["epoch"] + 1 for entry in history]
    for name in ("AP50", "AP", "AP_small"):
        axes.plot(epochs, [max(0.0, entry[name]) for entry in history], marker="o", markersize=3, label=name)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=DPI)


def draw_first_images(
    detections: Detections, data: DetectionDataset, names: Mapping[int, str]
) -> dict[int, Image.Image]:
    """The first DRAWN_IMAGES images that have objects, by image id: ground truth beside detections.

    Detections are shown from LOWEST_SCORE on, crowd regions as such.
    """
    samples = data.index.samples
    drawn = {}
    for row in np.flatnonzero(samples.boxes)[:DRAWN_IMAGES]:
        image_id = int(samples.image_id[row])
        image = data.sample(int(row)).image
        truth = [_draw_object(each, names) for each in data.read_annotations(int(row))["annotations"]]
        found = detections[(detections.image_ids == image_id) & (detections.scores >= LOWEST_SCORE)]
        prediction = Prediction(
            boxes=found.boxes_xywh.tolist(),
            scores=found.scores.tolist(),
            labels=[names[category] for category in found.category_ids.tolist()],
            category_ids=found.category_ids.tolist(),
        )
        drawn[image_id] = put_beside(
            [
                ("ground truth", draw_boxes(image, truth)),
                (f"detections from score {LOWEST_SCORE:g}", draw_detections(image, prediction)),
            ]
        )
    return drawn


def _draw_object(annotation: Mapping[str, Any], names: Mapping[int, str]) -> DrawnBox:
    category = annotation["category_id"]
    note = "crowd" if annotation.get("iscrowd") else ""
    return DrawnBox(annotation["bbox"], category, names[category], note, class_colour(category))
