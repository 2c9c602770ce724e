"""A sweep as text for the terminal: the plan before it, the table of its points and what pbt exchanged after it.

Pure functions; they never fail.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.config import dump_yaml, flatten
from tune.results.outcomes import Outcome, rank
from tune.search.ledger import Ledger
from tune.space import Axis, Space


def list_outcomes(space: Space, outcomes: Sequence[Outcome]) -> str:
    """One line per outcome, best first, then the failed ones' errors."""
    metric = space.search.metric
    header = ["trial", *(axis.label for axis in space.axes), "epochs", metric, "status"]
    ranked = rank(outcomes)
    rows = [
        [
            outcome.name,
            *(show_value(value_of(space, outcome, axis)) for axis in space.axes),
            str(outcome.epochs),
            _show_score(outcome),
            show_status(outcome),
        ]
        for outcome in ranked
    ]
    errors = [f"{outcome.name}: {outcome.error}" for outcome in ranked if outcome.error]
    return "\n".join([_align([header, *rows]), *errors])


def list_exchanges(ledger: Ledger) -> str:
    """One line per exchange of pbt; empty without one."""
    return "\n".join(
        f"after epoch {each.epoch} {each.trial} continued from {each.donor} with "
        + ", ".join(f"{label}={show_value(value)}" for label, value in each.values.items())
        for each in ledger.exchanges
    )


def show_status(outcome: Outcome) -> str:
    """A status as text: of an interrupted outcome `unfinished`, because its sweep may still be running."""
    return "unfinished" if outcome.status == "interrupted" else outcome.status


def show_value(value: Any) -> str:
    """A value of an axis as text."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(list(value) if isinstance(value, tuple) else value)


def value_of(space: Space, outcome: Outcome, axis: Axis) -> Any:
    """A value of an outcome as its config has it, such as 2.0 for 2; of `variant` its name."""
    if axis.bundles:
        return outcome.values[axis.label]
    return flatten(space.config(outcome.values, outcome.name))[axis.keys[0]]


def describe_plan(space: Space) -> str:
    """The text of `--dry-run`: the trials' common config, the search and its axes."""
    search = space.search
    number = "trials" if space.trials is None else "1 trial" if space.trials == 1 else f"{space.trials} trials"
    trials = f"{number} of up to {space.longest} epochs by {search.sampler} on {search.metric}"
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


def _show_score(outcome: Outcome) -> str:
    if outcome.score is None:
        return "-"
    return f"{outcome.score:.4f}" + (f" ± {outcome.spread:.4f}" if outcome.spread is not None else "")


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
