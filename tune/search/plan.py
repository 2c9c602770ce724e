"""What a sweep does next: start a trial, wait, or end. A pure function of the space and the ledger.

No two trials have one name, an ended trial is never started again, and no point is added beyond a budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tune.search.ledger import Ledger, Report, Status, add_point, add_report, end_trial, interrupt_running
from tune.search.pbt import exchange, target_epochs
from tune.search.sampling import next_values
from tune.space import Space


@dataclass(frozen=True)
class Step:
    """The next step, and the ledger with the trials that it added."""

    action: Literal["start", "exchange", "wait", "end"]
    ledger: Ledger
    trial: str = ""  # the name of the trial to start


def next_step(space: Space, ledger: Ledger) -> Step:
    """Choose the next step.

    Args:
        space: checked, with `search.concurrent` resolved.
        ledger: of everything so far, with `seconds` up to now.
    """
    running = len(ledger.with_status("running"))
    if running >= (space.search.concurrent or 1):
        return Step("wait", ledger)
    if not ledger.with_status("waiting"):
        ledger = _add_next_point(space, ledger)
    for trial in ledger.with_status("waiting"):
        return Step("start", ledger, trial.name)
    if ledger.with_status("paused") and not running:
        return Step("exchange", exchange(space, ledger))
    return Step("wait" if running else "end", ledger)  # a running trial may fail, or leave some of its epochs


def status_at_end(space: Space, ledger: Ledger, name: str) -> Status:
    """The status of a trial whose run has trained to its end; with pbt that is the end of its part."""
    if space.search.early_stop != "pbt":
        return "finished"
    target = target_epochs(space, ledger)
    if ledger.epochs(name) < target:
        return "waiting"  # it is the end of the part before
    return "finished" if target == space.base.train.epochs else "paused"


@dataclass(frozen=True)
class RunState:
    """What the run of a trial has on disk."""

    reports: tuple[Report, ...]
    finished: bool  # it has trained to its end


def reconcile(space: Space, ledger: Ledger, runs: Mapping[str, RunState]) -> Ledger:
    """The ledger of a sweep that was killed, with what its runs did after it was last written.

    Args:
        space: of the sweep.
        ledger: as it was read.
        runs: by the trial's name; those without a run are left out.
    """
    ledger = interrupt_running(ledger)
    for trial in ledger.with_status("waiting"):
        state = runs.get(trial.name, RunState((), False))
        for report in state.reports:
            ledger = add_report(ledger, report)
        if state.finished:
            ledger = end_trial(ledger, trial.name, status_at_end(space, ledger, trial.name))
    return ledger


def spent_epochs(space: Space, ledger: Ledger) -> int:
    """Epochs of all trials: those trained by ended ones, and all epochs of the others.

    An ended trial that has no score counts with all of its epochs. So trials that all fail come to an end, too.
    """
    spent = 0
    for trial in ledger.trials:
        trained = 0 if trial.status in ("waiting", "running") else ledger.epochs(trial.name)
        spent += trained or space.config(trial.values, trial.name).train.epochs
    return spent


def _add_next_point(space: Space, ledger: Ledger) -> Ledger:
    """The ledger with one point more, or as it is if the sampler or a budget is at its end."""
    search = space.search
    if search.minutes is not None and ledger.seconds >= 60 * search.minutes:
        return ledger
    number = len(ledger.points)
    values = next_values(space, ledger, number)
    if values is None:
        return ledger
    if search.epochs is not None:
        needed = search.repeats * space.config(values, "next").train.epochs
        if spent_epochs(space, ledger) + needed > search.epochs:
            return ledger
    return add_point(ledger, space.base.name, number, values, search.repeats)
