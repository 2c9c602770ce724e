"""The outcomes of a sweep: the result of each point, which one is the best, its config as a file.

Pure functions of the ledger, so the choice of the best trial is tested without Ray. With `search.repeats` an outcome is
a point with its mean over the repeats. A sweep without a score is a SweepError.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import dump_yaml
from pipeline.errors import SweepError
from pipeline.files.storage import join, write_bytes
from tune.search.ledger import Ledger, Trial, best_name
from tune.space import Space

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
    states = [status_of(trial) for trial in trials]
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


def status_of(trial: Trial) -> Status:
    """How a trial ended; `interrupted` if it has not."""
    status = trial.status
    return "interrupted" if status == "waiting" or status == "running" or status == "paused" else status


def rank(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, best first, the earlier one of two equals first; then failed ones, then those without a score."""
    return sorted(
        outcomes, key=lambda each: (each.score is not None, each.status != "failed", each.score or 0.0), reverse=True
    )


def find_best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The outcome with the highest score of those that have not failed, the earlier one of two equals; None if none.

    A failed one is never the best: its settings may have been the cause, and its other checkpoints are removed.
    """
    return next((each for each in rank(outcomes) if each.score is not None and each.status != "failed"), None)


def best(outcomes: Sequence[Outcome]) -> Outcome:
    """As `find_best`.

    Raises:
        SweepError: all trials failed, or none has a score.
    """
    winner = find_best(outcomes)
    if winner is None:
        ended = "ended before an evaluation, or no validation object has the size that search.metric counts"
        reasons = sorted({outcome.error or f"{outcome.name}: {ended}" for outcome in outcomes}) or ["none was started"]
        raise SweepError("all trials failed or have no score:\n  " + "\n  ".join(reasons))
    return winner


def best_config(space: Space, outcome: Outcome) -> str:
    """YAML of the config that trains `outcome`'s settings in full, for `jobs.train`."""
    config = space.config(outcome.values, best_name(space.base.name), register=True)
    head = f"# {space.search.metric} {outcome.score:.4f} after {outcome.epochs} epochs of trial {outcome.name}\n"
    return head + dump_yaml(config)


def write_best(space: Space, outcome: Outcome, folder: str) -> str:
    """Write `best_config` into the sweep's folder (path or URL) and return where it is."""
    path = join(folder, "best.yaml")
    write_bytes(path, best_config(space, outcome).encode())
    return path
