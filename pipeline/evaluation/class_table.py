"""The numbers of each class, worst first, as rows and as a table for a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.evaluation.coco import Scores, coco_scores, file_names, ground_truth_of_file, mean_known
from pipeline.evaluation.detections import from_results_json
from pipeline.evaluation.verification.start import verified
from pipeline.pages.render import clean

AT_50, AT_75 = 0, 5  # rows of IoU 0.50 and 0.75 in `Scores.precision`
NUMBERS = ("AP", "AP50", "AP75", "AR100")


@dataclass(frozen=True)
class ClassScore:
    """One category; a number is -1 if it has no object."""

    id: int
    name: str
    objects: int  # without crowd regions
    AP: float
    AP50: float
    AP75: float
    AR100: float


def class_scores(scores: Scores, names: Mapping[int, str]) -> list[ClassScore]:
    """A row per category by ascending AP; those without objects come last.

    Args:
        scores: of one evaluation.
        names: of the categories, by id.
    """
    objects = scores.task.objects
    counts = np.bincount(objects.categories[~objects.crowds] - 1, minlength=len(scores.category_ids))
    precision, recall = scores.precision, scores.recall
    rows = [
        ClassScore(
            category,
            names[category],
            int(counts[k]),
            mean_known(precision[:, :, k]),
            mean_known(precision[AT_50, :, k]),
            mean_known(precision[AT_75, :, k]),
            mean_known(recall[:, k]),
        )
        for k, category in enumerate(scores.category_ids)
    ]
    return sorted(rows, key=lambda row: (row.AP < 0, row.AP, row.name, row.id))


def score_file(results: Path, annotations: Path) -> tuple[dict[str, float], list[ClassScore]]:
    """The METRICS of a COCO results file, verified by pycocotools, and its classes.

    Raises:
        AnnotationError, DetectionError: see `detections.from_results_json` and `coco.coco_scores`.
    """
    truth = ground_truth_of_file(annotations)
    scores = verified(coco_scores(truth, from_results_json(results, file_names(truth))))
    names = {category["id"]: category["name"] for category in truth["categories"]}
    return scores.metrics, class_scores(scores, names)


def class_table(rows: Sequence[ClassScore]) -> str:
    """Lines of name, id, objects and NUMBERS in columns; `-` for a number that does not exist."""
    names = [str(clean(" ".join(row.name.split()))) for row in rows]  # in one line, without control characters
    width = max([len("class"), *map(len, names)])
    lines = [f"{'class':<{width}} {'id':>6} {'objects':>8}" + "".join(f" {name:>7}" for name in NUMBERS)]
    for row, name in zip(rows, names, strict=True):
        numbers = (asdict(row)[number] for number in NUMBERS)
        shown = "".join(f" {number:7.4f}" if number >= 0 else f" {'-':>7}" for number in numbers)
        lines.append(f"{name:<{width}} {row.id:>6} {row.objects:>8,}{shown}")
    return "\n".join(lines)
