"""Intervals by drawing images again, with replacement: of a number, and of the difference of two models. Never fails.

Both models get the same draws (a paired bootstrap), so that what is hard for both does not widen the interval of their
difference. The intervals hold percentiles of the draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.analysis.numbers import Evaluation, Numbers
from pipeline.evaluation.analysis.result import Difference, Estimate, Interval
from pipeline.evaluation.backends.base import Floats, Ints
from pipeline.evaluation.coco import METRICS

LEVEL = 0.95


@dataclass(frozen=True)
class Sample:
    """The numbers of the whole data set and of B draws: the 12 of METRICS, then AP of the K categories."""

    whole: Numbers
    values: Floats  # [12 + K]
    drawn: Floats  # [B, 12 + K]; -1 = the draw has no object of this


def draw_weights(images: int, draws: int, seed: int) -> Iterator[Ints]:
    """[I] how often each of the images is drawn; the same for the same arguments."""
    random = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.bincount(random.integers(0, images, images), minlength=images)


def draw(evaluation: Evaluation, images: int, draws: int, seed: int) -> Sample:
    """Compute the numbers of all images and of `draws` draws of as many images."""
    whole = evaluation.numbers()
    values = _values(whole)
    drawn = [_values(evaluation.numbers(weights)) for weights in draw_weights(images, draws, seed)]
    return Sample(whole, values, np.array(drawn).reshape(draws, len(values)))


def _values(numbers: Numbers) -> Floats:
    return np.concatenate([[numbers.metrics[name] for name in METRICS], numbers.category_ap])


def estimates(sample: Sample) -> list[Estimate]:
    """[12 + K] each number with its interval."""
    return [
        Estimate(float(value), _interval(column[column > -1], value > -1))
        for value, column in zip(sample.values, sample.drawn.T, strict=True)
    ]


def differences(ours: Sample, theirs: Sample) -> list[Difference]:
    """[12 + K] each number of `ours` minus that of `theirs`; both samples have the same draws."""
    found = []
    for place, (value, other) in enumerate(zip(ours.values, theirs.values, strict=True)):
        here, there = ours.drawn[:, place], theirs.drawn[:, place]
        changes = (here - there)[(here > -1) & (there > -1)]
        exists = bool(value > -1)
        interval = _interval(changes, exists)
        wins = np.count_nonzero(changes > 0) + 0.5 * np.count_nonzero(changes == 0)
        found.append(
            Difference(
                value=float(value),
                other=float(other),
                difference=Estimate(float(value - other) if exists else 0.0, interval),
                better=None if interval is None else float(wins / len(changes)),
            )
        )
    return found


def _interval(drawn: Floats, exists: bool) -> Interval | None:
    if not exists or not len(drawn):
        return None
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(low), float(high), len(drawn))
