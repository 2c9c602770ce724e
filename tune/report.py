"""Reports of a sweep: the plan before it, the table of trials after it, the best config as a file.

Pure functions over `Outcome`s, so the choice of the best trial is tested without Ray. With `search.repeats` an outcome
is a point with its mean over the repeats. A sweep without a score is a SweepError.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import dump_yaml, flatten
from pipeline.errors import SweepError
from pipeline.files.storage import join, write_bytes
from tune.search.ledger import Ledger, Trial
from tune.space import Axis, Space

Status = Literal["finished", "stopped early", "failed", "interrupted"]


# A point has the first of these that one of its trials has.
SEVERITY: tuple[Status, ...] = ("failed", "interrupted", "stopped early", "finished")


@dataclass(frozen=True)
class Outcome:
    """The result of one trial, or of the repeats of one point."""

    name: str  # its run's name
    values: Mapping[str, Any]  # axis label -> value
    status: Status
    epochs: int = 0  # trained and evaluated
    score: float | None = None  # highest value of the search's metric; None without an evaluation
    error: str = ""
    spread: float | None = None  # standard deviation over the repeats; None without repeats


def outcomes_of(space: Space, ledger: Ledger) -> list[Outcome]:
    """The outcomes of all trials of a sweep that has ended or was interrupted, one per point, in their order."""
    return [_outcome(space, ledger, point, ledger.of_point(point)) for point in ledger.points]


def _outcome(space: Space, ledger: Ledger, point: int, trials: Sequence[Trial]) -> Outcome:
    states = [_status(trial) for trial in trials]
    scores = [score for trial in trials if (score := ledger.score(trial.name)) is not None]
    complete = len(scores) == len(trials)  # a mean over fewer repeats is none of the point
    repeated = space.search.repeats > 1
    return Outcome(
        f"{space.base.name}-{point:03d}",
        trials[0].values,
        next(status for status in SEVERITY if status in states),
        max(ledger.epochs(trial.name) for trial in trials),
        statistics.fmean(scores) if complete else None,
        "; ".join(dict.fromkeys(trial.error for trial in trials if trial.error and trial.status == "failed")),
        statistics.stdev(scores) if complete and repeated else None,
    )


def _status(trial: Trial) -> Status:
    status = trial.status
    return "interrupted" if status == "waiting" or status == "running" or status == "paused" else status


def best(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome with the highest score, the earlier one of two equals.

    Raises:
        SweepError: no trial has a score.
    """
    scored = [outcome for outcome in outcomes if outcome.score is not None]
    if not scored:
        ended = "ended before an evaluation, or no validation object has the size that search.metric counts"
        reasons = sorted({outcome.error or f"{outcome.name}: {ended}" for outcome in outcomes}) or ["none was started"]
        raise SweepError("no trial has a score:\n  " + "\n  ".join(reasons))
    return max(scored, key=lambda outcome: outcome.score or 0.0)


def best_config(space: Space, outcome: Outcome) -> str:
    """YAML of the config that trains `outcome`'s settings in full, for `jobs.train`."""
    config = space.config(outcome.values, f"{space.base.name}-best", register=True)
    head = f"# {space.search.metric} {outcome.score:.4f} after {outcome.epochs} epochs of trial {outcome.name}\n"
    return head + dump_yaml(config)


def write_best(space: Space, outcome: Outcome, folder: str) -> str:
    """Write `best_config` into the sweep's folder (path or URL) and return where it is."""
    path = join(folder, "best.yaml")
    write_bytes(path, best_config(space, outcome).encode())
    return path


def table(space: Space, outcomes: Sequence[Outcome]) -> str:
    """One line per outcome, best first, then the failed ones' errors."""
    metric = space.search.metric
    header = ["trial", *(axis.label for axis in space.axes), "epochs", metric, "status"]
    ranked = sorted(outcomes, key=lambda outcome: -1.0 if outcome.score is None else outcome.score, reverse=True)
    rows = [
        [
            outcome.name,
            *(_show(space, outcome, axis) for axis in space.axes),
            str(outcome.epochs),
            _show_score(outcome),
            outcome.status,
        ]
        for outcome in ranked
    ]
    errors = [f"{outcome.name}: {outcome.error}" for outcome in ranked if outcome.error]
    return "\n".join([_align([header, *rows]), *errors])


def exchanges(ledger: Ledger) -> str:
    """One line per exchange of pbt; empty without one."""
    return "\n".join(
        f"after epoch {each.epoch} {each.trial} continued from {each.donor} with "
        + ", ".join(
            f"{label}={value:.3g}" if isinstance(value, float) else f"{label}={value}"
            for label, value in each.values.items()
        )
        for each in ledger.exchanges
    )


def plan(space: Space) -> str:
    """The text of `--dry-run`: the trials' common config, the search and its axes."""
    search = space.search
    number = f"{space.trials} trials" if space.trials is not None else "trials"
    trials = f"{number} of up to {space.base.train.epochs} epochs by {search.sampler} on {search.metric}"
    if search.repeats > 1:
        trials += f", {search.repeats} seeds each"
    if search.epochs is not None:
        trials += f", within {search.epochs} epochs of training"
    if search.minutes is not None:
        trials += f", started within {search.minutes:g} minutes"
    if space.rungs:
        trials += f"; asha: after {', '.join(map(str, space.rungs))} epochs 1 in {search.reduction} continues"
    if search.early_stop == "pbt":
        trials += f"; pbt: every {search.grace} epochs the worst {search.quantile:.0%} continue from the best"
    if search.early_stop == "median":
        trials += f"; after {search.grace} epochs those below the median of the others are stopped"
    rows = [[label, kind, text] for axis in space.axes for label, kind, text in _rows(axis)]
    return "\n".join([dump_yaml(space.base), trials, _align(rows)])


def _rows(axis: Axis) -> list[tuple[str, str, str]]:
    if axis.bundles:
        return [(axis.label, name, str(dict(settings))) for name, settings in axis.bundles.items()]
    kinds = axis.domain.model_dump(exclude_none=True)
    return [(axis.label, kind, str(list(values))) for kind, values in kinds.items()]


def _show(space: Space, outcome: Outcome, axis: Axis) -> str:
    value = outcome.values[axis.label]
    if not axis.bundles:  # as the config has it, such as 2.0 for 2
        value = flatten(space.config(outcome.values, outcome.name))[axis.keys[0]]
    return f"{value:.3g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


def _show_score(outcome: Outcome) -> str:
    if outcome.score is None:
        return "-"
    return f"{outcome.score:.4f}" + (f" ± {outcome.spread:.4f}" if outcome.spread is not None else "")


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
