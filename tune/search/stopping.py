"""Early stopping: Ray's ASHA and median rule, asked about the reports in the ledger instead of about Tune's trials.

The rule gets the ledger's reports in their order, so after a resume it decides as it would have decided before. It sees
a trial under the name in the ledger, also when Tune runs it a second time.
"""

from dataclasses import dataclass
from typing import Any

from tune.search.ledger import Ledger, Report, end_trial
from tune.space import Space


class StoppingRule:
    """Decides after each report whether its trial is stopped.

    Args:
        space: says which rule, and after how many epochs it may stop a trial.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._scheduler = make_scheduler(space)
        self._known: set[_Trial] = set()
        self._stopped: set[_Trial] = set()

    def stops(self, report: Report) -> bool:
        """Add a report; True if the trial is to be stopped. A trial that has all of its epochs is not."""
        trial = _Trial(report.trial)
        if self._scheduler is None or trial in self._stopped:
            return False
        from ray.tune.schedulers import TrialScheduler

        if trial not in self._known:
            self._known.add(trial)
            self._scheduler.on_trial_add(_Controller(), trial)
        result = {"epoch": report.epoch, self._space.search.metric: report.score}
        decision = self._scheduler.on_trial_result(_Controller(), trial, result)
        if decision != TrialScheduler.STOP or report.epoch >= self._space.base.train.epochs:
            return False
        self._stopped.add(trial)
        return True

    def replay(self, ledger: Ledger) -> Ledger:
        """Add all reports of a ledger; trials that are to be stopped and have not ended get that status."""
        for report in ledger.reports:
            if self.stops(report):
                ledger = end_trial(ledger, report.trial, "stopped early")
        return ledger


def make_scheduler(space: Space) -> Any:
    """Ray's scheduler for `search.scheduler`; None if no trial is stopped, as with pbt."""
    if space.search.early_stop in ("none", "pbt"):
        return None
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    common = {"time_attr": "epoch", "metric": space.search.metric, "mode": "max", "grace_period": space.search.grace}
    if space.search.early_stop == "median":
        return MedianStoppingRule(**common)
    return ASHAScheduler(
        **common,
        max_t=space.base.train.epochs - 0.5,  # the last epoch is no rung, and Ray's logarithm of 243 loses no other one
        reduction_factor=space.search.reduction,
        stop_last_trials=False,
    )


@dataclass(frozen=True)
class _Trial:
    """The part of Tune's trial that its schedulers use."""

    trial_id: str


class _Controller:
    """The part of Tune's controller that the median rule uses: no trial waits, so none is paused for another."""

    def get_live_trials(self) -> list[Any]:
        return []
