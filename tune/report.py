"""Reports of a sweep: the plan before it, the table of trials after it, the best config as a file.

Pure functions over `Outcome`s, so the choice of the best trial is tested without Ray. A sweep without a score is a
SweepError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import dump_yaml, flatten
from pipeline.errors import SweepError
from pipeline.files.storage import join, write_bytes
from tune.space import Axis, Space

Status = Literal["finished", "stopped early", "failed", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """The result of one trial."""

    name: str  # its run's name
    values: Mapping[str, Any]  # axis label -> value
    status: Status
    epochs: int = 0  # trained and evaluated
    score: float | None = None  # highest value of the search's metric; None without an evaluation
    error: str = ""


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
    """One line per trial, best first, then the failed ones' errors."""
    metric = space.search.metric
    header = ["trial", *(axis.label for axis in space.axes), "epochs", metric, "status"]
    ranked = sorted(outcomes, key=lambda outcome: -1.0 if outcome.score is None else outcome.score, reverse=True)
    rows = [
        [
            outcome.name,
            *(_show(space, outcome, axis) for axis in space.axes),
            str(outcome.epochs),
            "-" if outcome.score is None else f"{outcome.score:.4f}",
            outcome.status,
        ]
        for outcome in ranked
    ]
    errors = [f"{outcome.name}: {outcome.error}" for outcome in ranked if outcome.error]
    return "\n".join([_align([header, *rows]), *errors])


def plan(space: Space) -> str:
    """The text of `--dry-run`: the trials' common config, the search and its axes."""
    search = space.search
    trials = f"{space.trials} trials of up to {space.base.train.epochs} epochs by {search.method} on {search.metric}"
    if space.rungs:
        trials += f"; after {', '.join(map(str, space.rungs))} epochs 1 in {search.reduction} continues"
    rows = [[axis.label, kind, str(list(values))] for axis in space.axes for kind, values in _kinds(axis)]
    return "\n".join([dump_yaml(space.base), trials, _align(rows)])


def _kinds(axis: Axis) -> list[tuple[str, Any]]:
    return [(kind, values) for kind, values in axis.domain.model_dump(exclude_none=True).items()]


def _show(space: Space, outcome: Outcome, axis: Axis) -> str:
    value = flatten(space.config(outcome.values, outcome.name))[axis.keys[0]]
    return f"{value:.3g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
