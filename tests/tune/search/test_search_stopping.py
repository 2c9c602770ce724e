"""Early stopping by Ray's rules over the ledger's reports."""

from dataclasses import replace

import pytest
from support.sweeps import make_space

from tune.search.ledger import Report
from tune.search.stopping import StoppingRule, make_scheduler


@pytest.mark.parametrize(
    ("epochs", "grace", "reduction"),
    [(2, 1, 2), (4, 1, 2), (9, 1, 3), (10, 1, 3), (12, 3, 2), (50, 4, 3), (126, 1, 5), (244, 1, 3), (1001, 1, 10)],
)
def test_rungs_equal_rays_own(epochs: int, grace: int, reduction: int) -> None:
    space = make_space({"scheduler": "asha", "grace": grace, "reduction": reduction}, epochs=epochs)
    (bracket,) = make_scheduler(space)._brackets
    assert tuple(sorted(milestone for milestone, _ in bracket._rungs)) == space.rungs
    assert space.rungs[-1] < epochs


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_weak_trial_is_stopped_and_a_good_one_is_not(scheduler: str) -> None:
    rule = StoppingRule(make_space({"scheduler": scheduler, "reduction": 2}))
    for name, score in (("a", 0.3), ("b", 0.4), ("c", 0.5)):
        assert not any(rule.stops(Report(name, epoch, epoch, score + epoch / 100)) for epoch in range(1, 5))
    assert not rule.stops(Report("good", 1, 1, 0.6))
    assert rule.stops(Report("weak", 1, 1, 0.1))
    assert not rule.stops(Report("weak", 2, 2, 0.1))  # it is stopped already, and its late report changes nothing


@pytest.mark.parametrize("scheduler", ["none", "asha", "median"])
def test_trial_at_its_last_epoch_is_not_stopped(scheduler: str) -> None:
    rule = StoppingRule(make_space({"scheduler": scheduler, "reduction": 2, "grace": 3}))
    for name in "abcd":
        for epoch in range(1, 5):
            assert not rule.stops(Report(name, epoch, epoch, 0.5))
    assert not rule.stops(Report("weak", 4, 4, 0.1))


def test_no_scheduler_stops_nothing() -> None:
    space = make_space({"scheduler": "none"})
    assert make_scheduler(space) is None
    assert space.rungs == make_space({"sampler": "grid"}, {"optim.lr": {"grid": (1e-4,)}}).rungs == ()
    assert make_space({"repeats": 2}).search.early_stop == "none"
    assert replace(space, search=make_space({}).search).rungs == (1, 3)
