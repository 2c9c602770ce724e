"""The 12 numbers out of a backend's arrays, with pycocotools' arithmetic. Imports no torch. Never fails."""

import numpy as np

from pipeline.evaluation.backends.base import LIMITS, SIZES, Arrays, Floats

METRICS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


def summarise(arrays: Arrays, place: int = LIMITS.index(100)) -> dict[str, float]:
    """The METRICS out of the arrays, with pycocotools' arithmetic: means over all entries that exist.

    Args:
        arrays: of one evaluation.
        place: of the limit (M axis) that AP, and AR beyond 10, are taken at.
    """
    precision, recall = arrays.precision[..., place], arrays.recall
    values = [mean_known(precision[..., 0]), mean_known(precision[0, ..., 0]), mean_known(precision[5, ..., 0])]
    values += [mean_known(precision[..., size]) for size in range(1, len(SIZES))]
    values += [mean_known(recall[..., 0, limit]) for limit in (0, 1, place)]
    values += [mean_known(recall[..., size, place]) for size in range(1, len(SIZES))]
    return dict(zip(METRICS, values, strict=True))


def mean_known(values: Floats) -> float:
    """Mean over the entries that exist, -1 if there are none, as in pycocotools."""
    known = values[values > -1]
    return float(np.mean(known)) if len(known) else -1.0
