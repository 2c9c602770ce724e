"""The result of an analysis: what a page, a file and a promotion read. Pure data, never fails.

Every AP, AR, precision and recall is a fraction from 0 to 1. As in pycocotools, -1 means that the ground truth has no
object that the number is about; such a number has no interval. Boxes are xywh in pixels of the original image. Category
and image ids are those of the annotations.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

FORMAT, VERSION = "detection-analysis", 1
NUMBERS, PAGE = "analysis.json", "index.html"  # names of the files
Cause = Literal["classification", "localisation", "both", "duplicate", "background", "missed"]
CAUSES: tuple[Cause, ...] = ("classification", "localisation", "both", "duplicate", "background", "missed")


@dataclass(frozen=True)
class Interval:
    """Percentile interval of a bootstrap over images."""

    low: float
    high: float
    draws: int  # draws that have the number; a draw may lack every image with objects of a rare category


@dataclass(frozen=True)
class Estimate:
    """A number of the whole data set, and how far it moves when the images are drawn again."""

    value: float  # bit-equal to pycocotools where it has the number
    interval: Interval | None  # None where `value` is -1, and where no draw has the number


@dataclass(frozen=True)
class OperatingPoint:
    """What remains of the detections whose score is at least `threshold`, at IoU 0.5."""

    threshold: float  # a score of a detection; 1.0 if there is none to keep
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ThresholdCurve:
    """Detections of all categories together, at IoU 0.5, by the score from which on they are kept."""

    thresholds: tuple[float, ...]  # [101] 0.00, 0.01, ... 1.00
    precision: tuple[float, ...]  # [101] 1.0 where nothing is kept
    recall: tuple[float, ...]  # [101]
    f1: tuple[float, ...]  # [101]
    best: OperatingPoint  # highest F1 over all scores


@dataclass(frozen=True)
class ErrorCost:
    """One cause of errors as in TIDE (Bolya et al., ECCV 2020, arXiv 2008.08115)."""

    cause: Cause
    count: int  # detections, or objects for "missed"; without detections in a crowd region, which cost no AP
    share: float  # of the errors of all causes, from 0 to 1
    ap_cost: float  # dAP: gain of AP50 if only these errors were corrected; the costs do not add up to 1 - AP50


@dataclass(frozen=True)
class Errors:
    """Error shares as in TIDE, at `iou`."""

    iou: float  # a detection of the right category is correct from here on, 0.5
    background_iou: float  # a detection that overlaps no object more than this is background, 0.1
    ap: float  # AP at `iou`, which the costs are measured against
    costs: tuple[ErrorCost, ...]  # in the order of CAUSES
    false_positive_cost: float  # gain if every wrong detection had the lowest score
    false_negative_cost: float  # gain if every object that was not found did not exist


@dataclass(frozen=True)
class CategoryResult:
    """One category."""

    id: int
    name: str
    objects: int  # without crowd regions
    images: int  # that have such objects
    detections: int  # at most the best 100 of each image
    ap: Estimate
    ap50: float
    ap75: float
    ar100: float
    best: OperatingPoint  # with the highest F1 of this category
    errors: Mapping[Cause, int]  # counts by the category of the detection; "missed" by that of the object


@dataclass(frozen=True)
class Confusion:
    """Which category was detected where another one is, at one threshold for all categories.

    Objects are first matched to detections of their own category, then what is left to any other. Crowd regions and
    detections in them are left out.
    """

    threshold: float  # detections with a lower score are left out; `ThresholdCurve.best`
    iou: float
    category_ids: tuple[int, ...]  # [K]
    counts: tuple[tuple[int, ...], ...]  # [K + 1][K + 1] rows: object, columns: detection; the last one is background


@dataclass(frozen=True)
class Bin:
    """Objects of a range of sizes or shapes. As for pycocotools' `areaRng`, both ends are included."""

    low: float
    high: float | None  # None = no limit
    objects: int
    ap: float
    ap50: float
    ar100: float


@dataclass(frozen=True)
class QueryRecall:
    """Recall over the number of queries that are kept, best first, with one detection per query."""

    queries: tuple[int, ...]  # [N] ascending
    recall: tuple[float, ...]  # [N] average over IoU 0.50 to 0.95; category and box must be right
    box_recall: tuple[float, ...]  # [N] the same with any category


@dataclass(frozen=True)
class DrawnObject:
    """An object of the ground truth in an image."""

    category_id: int
    box_xywh: tuple[float, float, float, float]
    crowd: bool
    found: bool  # by a detection of its category that is kept, at IoU 0.5; a crowd region counts as found


@dataclass(frozen=True)
class DrawnDetection:
    """A detection that is kept in an image."""

    category_id: int
    box_xywh: tuple[float, float, float, float]
    score: float
    cause: Cause | None  # what is wrong; None = correct, or in a crowd region


@dataclass(frozen=True)
class ImageResult:
    """One image at `ThresholdCurve.best.threshold` and IoU 0.5, with all that is to be drawn."""

    image_id: int
    correct: int
    wrong: int  # detections that are kept and are not correct
    missed: int  # objects that are not found
    f1: float
    objects: tuple[DrawnObject, ...]  # crowd regions included
    detections: tuple[DrawnDetection, ...]  # highest score first


@dataclass(frozen=True)
class Difference:
    """A number of this model minus the same of the other, over the same drawn images."""

    value: float  # of this model; -1 = no such object
    other: float
    difference: Estimate  # 0.0 without an interval where there is no such object
    better: float | None  # share of draws in which this model is better; None without draws


@dataclass(frozen=True)
class CategoryDifference:
    """AP of one category in two models."""

    id: int
    name: str
    objects: int
    ap: Difference


@dataclass(frozen=True)
class ImagePair:
    """The same image in two models, each at its own threshold."""

    this: ImageResult
    other: ImageResult


@dataclass(frozen=True)
class Comparison:
    """This model against another one on the same images: paired bootstrap."""

    draws: int
    seed: int
    level: float  # of the intervals, 0.95
    metrics: Mapping[str, Difference]  # the 12 numbers, by coco.METRICS
    categories: tuple[CategoryDifference, ...]  # by ascending id
    error_costs: Mapping[Cause, tuple[float, float]]  # `ErrorCost.ap_cost` of this and the other model
    gained: tuple[ImagePair, ...]  # images with the most errors fewer than in the other model, at most 12
    lost: tuple[ImagePair, ...]  # images with the most errors more, at most 12


@dataclass(frozen=True)
class Analysis:
    """Everything about one set of detections, and about another one if there are two."""

    images: int
    objects: int  # without crowd regions
    detections: int  # at most the best 100 of each image and category
    draws: int
    seed: int
    level: float  # of the intervals, 0.95
    metrics: Mapping[str, Estimate]  # the 12 numbers, by coco.METRICS
    categories: tuple[CategoryResult, ...]  # by ascending id
    errors: Errors  # of all detections
    kept_errors: Errors  # of the detections from `thresholds.best.threshold` on, as if there were no others
    confusion: Confusion
    thresholds: ThresholdCurve
    sizes: tuple[Bin, ...]  # by the square root of the object's area, in pixels
    aspect_ratios: tuple[Bin, ...]  # by the width of the object's box divided by its height
    worst: tuple[ImageResult, ...]  # lowest F1, then most errors; at most 24
    most_missed: tuple[ImageResult, ...]  # most objects that were not found; at most 24
    queries: QueryRecall | None = None  # needs a model
    comparison: Comparison | None = None


def to_json(analysis: Analysis) -> str:
    """The analysis as one line of JSON: its fields, and `format` and `version`. No value is NaN or infinite."""
    return json.dumps({"format": FORMAT, "version": VERSION, **as_tree(analysis)}, allow_nan=False)


def as_tree(result: Any) -> dict[str, Any]:
    """A dataclass of this module as dictionaries, lists and numbers; mappings become plain dictionaries."""
    tree: dict[str, Any] = asdict(result)
    return tree
