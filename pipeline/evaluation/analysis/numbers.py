"""The 12 COCO numbers and AP of each category, of all images or of images drawn again. Never fails.

They are the means that `COCOeval.summarize` takes of the same arrays in the same order, so the last digit is the same.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.analysis.curves import Accumulator, Curve, by_area
from pipeline.evaluation.analysis.table import Table
from pipeline.evaluation.backends.base import Floats, Ints
from pipeline.evaluation.coco import METRICS, mean_known

SIDES = {"": (0.0, 1e5), "_small": (0.0, 32.0), "_medium": (32.0, 96.0), "_large": (96.0, 1e5)}  # pixels


@dataclass(frozen=True)
class Numbers:
    """One evaluation; -1 = no object."""

    metrics: dict[str, float]  # by coco.METRICS
    whole: Curve  # objects of all sizes
    category_ap: Floats  # [K]


class Evaluation:
    """A table, matched for the four ranges of sizes of pycocotools."""

    def __init__(self, table: Table) -> None:
        self._ranges = {
            suffix: Accumulator(table, *by_area(table, *sides), limits=() if suffix else (1, 10))
            for suffix, sides in SIDES.items()
        }

    def numbers(self, weights: Ints | None = None) -> Numbers:
        """The numbers if image i counts `weights[i]` times; without `weights`, once each."""
        curves = {suffix: accumulator.curve(weights) for suffix, accumulator in self._ranges.items()}
        whole = curves[""]
        found = {"AP50": mean_known(whole.precision[[0]]), "AP75": mean_known(whole.precision[[5]])}
        for suffix, curve in curves.items():
            found[f"AP{suffix}"] = mean_known(curve.precision)
            found[f"AR{suffix or 100}"] = mean_known(curve.recall)
        for limit, recall in whole.recall_of_best.items():
            found[f"AR{limit}"] = mean_known(recall)
        return Numbers({name: found[name] for name in METRICS}, whole, category_means(whole.precision))


def category_means(precision: Floats) -> Floats:
    """[K] `mean_known` each category of [T, R, K]."""
    return np.array([mean_known(precision[:, :, k]) for k in range(precision.shape[2])], np.float64)
