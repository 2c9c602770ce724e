"""The rules of a promotion, and the data that two versions are compared on."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.evaluation.analysis.result import CategoryDifference, Comparison, Difference, Estimate, Interval
from pipeline.evaluation.summary import METRICS
from pipeline.registry.decision import Rules, ValidationData, choose_folder, decide

CHANGES = st.floats(-0.5, 0.5)  # around an AP of 0.5


def difference(change: float, low: float | None = None, high: float | None = None) -> Difference:
    interval = None if low is None or high is None else Interval(low, high, 200)
    return Difference(0.5 + change, 0.5, Estimate(change, interval), None)


def comparison(gain: Difference, *classes: float | None, metric: str = "AP") -> Comparison:
    """With a gain in one metric, and the changes of classes; None is a class without objects."""
    rows = [difference(0.0 if change is None else change) for change in classes]
    rows = [
        Difference(-1, -1, Estimate(0.0, None), None) if change is None else row
        for row, change in zip(rows, classes, strict=True)
    ]
    categories = tuple(CategoryDifference(k, f"class {k}", 10, row) for k, row in enumerate(rows))
    metrics = {name: gain if name == metric else difference(0.0) for name in METRICS}
    return Comparison(200, 0, 0.95, metrics, categories, {}, (), ())


@pytest.mark.parametrize(
    ("gain", "classes", "passed"),
    [
        (0.01, (0.01, 0.0), True),
        (0.412 - 0.410, (), True),
        (0.0019, (), False),
        (0.0, (0.0,), False),
        (-0.1, (0.1,), False),
        (0.01, (0.1, -0.02), True),
        (0.01, (0.1, -0.021), False),
        (0.01, (None, 0.1), True),
    ],
)
def test_decide_with_the_default_rules(gain: float, classes: tuple[float | None, ...], passed: bool) -> None:
    assert decide(comparison(difference(gain), *classes), Rules()).passed == passed


@given(CHANGES, st.lists(CHANGES, max_size=4), CHANGES, CHANGES, CHANGES)
def test_decide_better_numbers_and_looser_rules_never_refuse_what_passed(
    gain: float, classes: list[float], min_gain: float, lowest: float, more: float
) -> None:
    more, rules = abs(more), Rules("AP", min_gain, lowest)
    if decide(comparison(difference(gain), *classes), rules).passed:
        better = comparison(difference(gain + more), *(each + more for each in classes))
        assert decide(better, rules).passed
        assert decide(comparison(difference(gain), *classes), Rules("AP", min_gain - more, lowest - more)).passed
    else:
        worst = min([gain - min_gain, *(each - lowest for each in classes)])
        assert worst < 0


@pytest.mark.parametrize("metric", METRICS)
def test_decide_reads_the_metric_of_the_rules(metric: str) -> None:
    found = comparison(difference(0.1), metric=metric)
    for other in METRICS:
        assert decide(found, Rules(other)).passed == (other == metric)


def test_decide_reason_names_numbers_limits_and_the_worst_classes() -> None:
    found = decide(comparison(difference(0.01, -0.001, 0.02), *[-0.03 - 0.01 * k for k in range(7)]), Rules())
    assert not found.passed
    for part in ("+0.0100", "-0.0010 to +0.0200", "--min-gain 0.002", "contains 0", "7 classes", "--no-class-below"):
        assert part in found.reason
    assert found.reason.index("class 6 -0.0900") < found.reason.index("class 5")
    assert "class 1 " not in found.reason
    assert "and 2 more" in found.reason
    assert "contains 0" not in decide(comparison(difference(0.01, 0.001, 0.02)), Rules()).reason


@pytest.mark.parametrize(("recorded", "found"), [*product(product(["a", "b", ""], repeat=2), repeat=2)])
def test_choose_folder_is_one_that_holds_the_data_of_both(recorded: tuple[str, str], found: tuple[str, str]) -> None:
    one, other = (
        ValidationData(f"models:/m/{k}", f"folder-{k}", was, now)
        for k, (was, now) in enumerate(zip(recorded, found, strict=True), 1)
    )
    known = {side.digest for side in (one, other)}
    if len(known) == 1 and known <= set(found) - {""}:
        folder = choose_folder(one, other)
        assert {side.found for side in (one, other) if side.folder == folder} == known
    else:
        with pytest.raises(ConfigError, match=r"data\.val"):
            choose_folder(one, other)
