"""The importance of settings: a planted one is found, and with too few points there is none."""

import pytest
from support.sweeps import make_space

from tune.results.importance import MIN_POINTS, find_importance
from tune.results.outcomes import Outcome
from tune.search.sampling import draw
from tune.space import Space

AXES = {
    "optim.lr": {"loguniform": (1e-5, 1e-2)},
    "optim.drop_epochs": {"choice": ([2], [3], [2, 3])},
    "model.queries": {"randint": (10, 100)},
    "train.micro_batch": {"grid": (1, 2)},
}


def outcomes(space: Space, points: int, decisive: str) -> list[Outcome]:
    """Scores that depend on one axis, and a little on chance."""
    found = []
    for point in range(points):
        values = draw(space, point)
        value = values[decisive]
        score = float(value == [3]) if isinstance(value, list) else -abs(float(value) - 60)
        found.append(Outcome(f"p{point}", values, "finished", 1, score + point % 7 / 1000))
    return found


@pytest.mark.parametrize("decisive", ["optim.drop_epochs", "model.queries"])
def test_importance_finds_the_setting_that_decides(decisive: str) -> None:
    space = make_space({"samples": 1}, AXES)
    found = find_importance(space, outcomes(space, 40, decisive))
    assert next(iter(found.shares)) == decisive
    assert found.shares[decisive] > 0.5
    assert sum(found.shares.values()) == pytest.approx(1)
    assert set(found.shares) == set(AXES)
    assert list(found.shares.values()) == sorted(found.shares.values(), reverse=True)


def test_importance_of_few_points_is_missing() -> None:
    space = make_space({"samples": 1}, AXES)
    points = outcomes(space, MIN_POINTS, "model.queries")
    assert find_importance(space, points).shares
    few = [*points[1:], Outcome("failed", points[0].values, "failed")]
    assert str(MIN_POINTS) in find_importance(space, few).missing
    assert find_importance(space, []).missing


def test_importance_of_equal_scores_or_pbt_is_missing() -> None:
    space = make_space({"samples": 1}, AXES)
    equal = [Outcome(f"p{point}", draw(space, point), "finished", 1, 0.5) for point in range(30)]
    assert "same score" in find_importance(space, equal).missing
    population = make_space({"samples": 30, "scheduler": "pbt"}, {"optim.lr": {"loguniform": (1e-5, 1e-2)}})
    assert "pbt" in find_importance(population, equal).missing
