"""Intervals contain what was planted, as often as they say."""

import numpy as np
import pytest
from support.coco_reference import perfect
from support.detection_sets import draw_set
from support.planted_models import Population, draw_pair

from pipeline.evaluation.analysis.analyse import compare
from pipeline.evaluation.analysis.bootstrap import differences, draw, draw_weights, estimates
from pipeline.evaluation.analysis.numbers import Evaluation
from pipeline.evaluation.analysis.table import build_table
from pipeline.evaluation.coco import METRICS


def test_draw_weights_are_multinomial_and_repeatable() -> None:
    first, second = list(draw_weights(50, 30, seed=4)), list(draw_weights(50, 30, seed=4))
    assert all(weights.sum() == 50 for weights in first)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, list(draw_weights(50, 30, seed=5)))


def test_estimates_are_the_numbers_with_intervals_around_them() -> None:
    truth, found = draw_set(3, images=60)
    evaluation = Evaluation(build_table(truth, found))
    sample = draw(evaluation, 60, draws=40, seed=0)
    result = estimates(sample)
    assert [estimate.value for estimate in result[:12]] == list(evaluation.numbers().metrics.values())
    assert len(result) == len(METRICS) + 4
    for estimate in result[:-1]:
        assert estimate.interval is not None
        assert estimate.interval.low < estimate.interval.high
        assert estimate.interval.draws <= 40
    assert (result[-1].value, result[-1].interval) == (-1.0, None)  # the category without objects


def test_estimates_perfect_detector_has_no_uncertainty() -> None:
    truth, _ = draw_set(3)
    evaluation = Evaluation(build_table(truth, perfect(truth)))
    ap = estimates(draw(evaluation, 30, draws=20, seed=0))[0]
    assert ap.interval is not None
    assert (ap.interval.low, ap.interval.high) == pytest.approx((1.0, 1.0))


def test_estimates_without_draws_have_no_interval() -> None:
    truth, found = draw_set(3)
    evaluation = Evaluation(build_table(truth, found))
    sample = draw(evaluation, 30, draws=0, seed=0)
    assert all(estimate.interval is None for estimate in estimates(sample))
    assert all(difference.better is None for difference in differences(sample, sample))


def test_estimates_count_the_draws_that_have_the_number() -> None:
    truth, found = draw_set(3, images=12)
    rare = [a for a in truth["annotations"] if a["category_id"] != 1][:]
    rare.append(next(a for a in truth["annotations"] if a["category_id"] == 1 and not a["iscrowd"]))
    evaluation = Evaluation(build_table({**truth, "annotations": rare}, found))
    interval = estimates(draw(evaluation, 12, draws=50, seed=0))[12].interval
    assert interval is not None
    assert 20 < interval.draws < 45  # one image of 12 is in a draw with probability 0.65


def test_differences_of_a_model_with_itself_are_zero() -> None:
    truth, found = draw_set(8)
    result = compare(truth, found, found, draws=15)
    for difference in result.metrics.values():
        assert difference.difference.value == 0
        interval = difference.difference.interval
        assert interval is not None
        assert (interval.low, interval.high, difference.better) == (0.0, 0.0, 0.5)
    assert (result.gained, result.lost) == ((), ())


def test_differences_change_sign_with_the_order_of_models() -> None:
    truth, found = draw_set(8)
    worse = found[::2]
    here, there = compare(truth, found, worse, draws=25), compare(truth, worse, found, draws=25)
    for name in METRICS:
        first, second = here.metrics[name], there.metrics[name]
        assert first.difference.value == -second.difference.value
        assert first.difference.interval is not None
        assert second.difference.interval is not None
        assert first.difference.interval.low == pytest.approx(-second.difference.interval.high)
        assert first.better == pytest.approx(1 - (second.better or 0.0))
    assert here.metrics["AP"].better == 1.0


def test_differences_paired_interval_is_narrower_than_unpaired() -> None:
    truth, ours, theirs = draw_pair(Population(images=80), seed=1)
    ours_sample, theirs_sample = (
        draw(Evaluation(build_table(truth, found)), 80, draws=60, seed=0) for found in (ours, theirs)
    )
    other = draw(Evaluation(build_table(truth, theirs)), 80, draws=60, seed=99)
    paired = differences(ours_sample, theirs_sample)[0].difference.interval
    unpaired = differences(ours_sample, other)[0].difference.interval
    assert paired is not None
    assert unpaired is not None
    assert paired.high - paired.low < 0.8 * (unpaired.high - unpaired.low)


def coverage(pairs: int, draws: int, images: int, population: int) -> float:
    """Share of drawn pairs of models whose interval contains the AP difference in `population` images."""
    large = compare(*draw_pair(Population(images=population), seed=10**6), draws=0).metrics["AP"].difference.value
    hits = 0
    for seed in range(pairs):
        found = compare(*draw_pair(Population(images=images), seed), draws=draws, seed=seed)
        interval = found.metrics["AP"].difference.interval
        assert interval is not None
        hits += interval.low <= large <= interval.high
    return hits / pairs


def test_differences_interval_contains_the_planted_difference_quick() -> None:
    assert coverage(pairs=12, draws=60, images=60, population=2000) >= 0.75


@pytest.mark.slow
def test_differences_interval_contains_the_planted_difference() -> None:
    assert coverage(pairs=200, draws=200, images=150, population=20_000) >= 0.9
