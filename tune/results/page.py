"""The page of a sweep: ranking, curves, importance, values, what happened to the trials. It never fails.

Its numbers are those that MLflow has of the trials' runs; means and spreads are over them.
"""

import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline import __version__
from pipeline.config import dump_yaml
from pipeline.pages.figures import Drawing, to_plot
from pipeline.pages.parts import Cell, Code, Column, Details, Facts, Heading, Page, Part, Table, Text
from pipeline.training.monitoring.meter import format_duration
from tune.results.events import find_events
from tune.results.importance import Importance
from tune.results.listing import describe_plan, show_status, show_value, value_of
from tune.results.outcomes import Outcome, find_best, rank
from tune.results.source import Results
from tune.search.ledger import ENDED
from tune.space import VARIANT

COCO = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # as in the paper's tables


def build_page(results: Results, importance: Importance, plots: Mapping[str, Drawing]) -> Page:
    """The page.

    Args:
        results: of the sweep.
        importance: `find_importance` of them.
        plots: `plots_of` them.
    """
    return Page(
        f"Sweep {results.space.base.name}",
        [
            *_summary(results),
            *_ranking(results),
            *_convergence(results, plots),
            *_coco(results),
            *_importance(importance, plots),
            *_values(plots),
            *_events(results),
            *_trials(results),
            *_settings(results),
        ],
    )


def _summary(results: Results) -> list[Part]:
    space, ledger = results.space, results.ledger
    search = space.search
    counts = Counter(trial.status for trial in ledger.trials)
    states = ", ".join(f"{number} {status}" for status, number in counts.items())
    facts = [
        ("Search", f"sampler {search.sampler}, scheduler {search.early_stop}, seed {search.seed}"),
        ("Ranked by", f"highest {search.metric} over the epochs of a trial"),
        ("Trials", f"{len(ledger.trials)}: {states}" if states else "none was started"),
        ("Time", f"{format_duration(ledger.seconds)}, over all starts of the sweep"),
        ("Folder", results.folder),
        ("MLflow run", ledger.run_id or "none: MLflow did not answer"),
        ("Version", __version__),
    ]
    if search.repeats > 1:
        facts.insert(2, ("Repeats", f"{search.repeats} seeds of each point; mean and standard deviation"))
    parts: list[Part] = [Facts(facts)]
    if any(trial.status not in ENDED for trial in ledger.trials):
        state = (
            f"The sweep is run by {results.runner}."
            if results.runner
            else "`python -m tune.sweep SPACE --resume` continues the sweep."
        )
        parts.append(Text(f"Some trials have not ended. {state} At its end this page is made again.", warning=True))
    best = find_best(results.outcomes)
    if best is None:
        return [*parts, Text("There is no best trial yet: each has failed or has no score.", warning=True)]
    spread = "" if best.spread is None else f", standard deviation {best.spread:.4f}"
    values = "; ".join(f"{label}: {show_value(value)}" for label, value in best.values.items())
    text = f"Best: {best.name}, {search.metric} {best.score:.4f}{spread}. {values}. Its config, to train it in full:"
    return [*parts, Text(text), Code(shlex.join(["python", "-m", "jobs.train", f"{results.folder}/best.yaml"]))]


def _ranking(results: Results) -> list[Part]:
    space, metric = results.space, results.space.search.metric
    repeated = space.search.repeats > 1
    columns = [
        Column("point"),
        Column(metric, 4, "mean over the repeats of the highest value of each" if repeated else "highest value"),
        *([Column("spread", 4, "standard deviation over the repeats")] if repeated else []),
        Column("epochs", meaning="trained and evaluated"),
        Column("status"),
        *(Column(axis.label, 3, significant=True) for axis in space.axes),
        Column("parameters (M)", 4, "millions, with frozen ones", significant=True),
        Column(
            "multiply-adds (G)",
            4,
            "thousand millions for an image in evaluation, mean over the validation images",
            significant=True,
        ),
        Column("s / epoch", 2, "seconds of an epoch's steps, median of its last epochs, without evaluation"),
    ]
    rows: list[list[Cell]] = []
    for outcome in rank(results.outcomes):
        trials = results.trials_of(outcome)
        cost = results.costs.get(trials[0].name)
        rows.append(
            [
                outcome.name,
                outcome.score,
                *([outcome.spread] if repeated else []),
                outcome.epochs,
                _status(outcome),
                *(_value_cell(results, outcome, k) for k in range(len(space.axes))),
                cost.parameters / 1e6 if cost else None,
                cost.multiply_adds / 1e9 if cost else None,
                _mean([run.epoch_seconds for trial in trials if (run := results.runs.get(trial.name))]),
            ]
        )
    parts: list[Part] = [Heading("Ranking")]
    if space.search.early_stop == "pbt":
        parts.append(Text("The values are the last ones of each trial; pbt has changed them during the training."))
    if results.cost_fault:
        parts.append(Text(f"Parameters and multiply-adds are not known: {results.cost_fault}", warning=True))
    return [*parts, Table("Points, best first", columns, rows)]


def _convergence(results: Results, plots: Mapping[str, Drawing]) -> list[Part]:
    if "curves" not in plots:
        return []
    metric = results.space.search.metric
    rows: list[list[Cell]] = [[each.trial, each.epoch, each.step, each.score] for each in results.ledger.reports]
    columns = [Column("trial"), Column("epoch"), Column("step"), Column(metric, 4)]
    return [
        Heading("Convergence"),
        to_plot(plots["curves"]),
        Details("All evaluations", [Table("Evaluations, in the order of their arrival", columns, rows)]),
    ]


def _coco(results: Results) -> list[Part]:
    rows: list[list[Cell]] = []
    for outcome in rank(results.outcomes):
        trials = results.trials_of(outcome)
        entries = [run.entry for trial in trials if (run := results.runs.get(trial.name)) and run.entry]
        if outcome.score is not None and len(entries) == len(trials):
            means = [_mean([_known(entry.get(name)) for entry in entries]) for name in COCO]
            rows.append([outcome.name, *([outcome.values[VARIANT]] if VARIANT in outcome.values else []), *means])
    if not rows:
        return []
    text = f"At the evaluation with the highest {results.space.search.metric} of each trial"
    text += ", mean over the repeats." if results.space.search.repeats > 1 else "."
    variants = [Column(VARIANT)] if any(axis.bundles for axis in results.space.axes) else []
    columns = [Column("point"), *variants, *(Column(name, 4) for name in COCO)]
    return [Heading("COCO numbers"), Text(text), Table("COCO numbers of the points, best first", columns, rows)]


def _importance(importance: Importance, plots: Mapping[str, Drawing]) -> list[Part]:
    heading = Heading("Importance")
    if importance.missing:
        return [heading, Text(f"The importance of the settings is not known: {importance.missing}.")]
    text = (
        f"By PED-ANOVA (arXiv 2304.10255) over the {importance.points} points with a score: how much the best quarter "
        "of them prefers some values of a setting. It says nothing about which values, and with few points it is rough."
    )
    rows: list[list[Cell]] = [[label, share] for label, share in importance.shares.items()]
    table = Table("Importance of the settings", [Column("setting"), Column("share")], rows)
    return [heading, Text(text), to_plot(plots["importance"]), table]


def _values(plots: Mapping[str, Drawing]) -> list[Part]:
    return [Heading("Values"), to_plot(plots["values"])] if "values" in plots else []


def _events(results: Results) -> list[Part]:
    events = find_events(results.space, results.ledger)
    rows: list[list[Cell]] = [[each.trial, each.what, each.epoch, each.score, each.least, each.why] for each in events]
    columns = [
        Column("trial"),
        Column("what happened"),
        Column("after epoch", meaning="0: before its first evaluation"),
        Column(results.space.search.metric, 4, "with which it was compared"),
        Column("needed", 4, "at least, to continue"),
        Column("why"),
    ]
    heading = Heading("Stopped, failed, exchanged")
    if not rows:
        return [heading, Text("Every trial trained to its end at its first start.")]
    return [heading, Table("What happened to the trials", columns, rows)]


def _trials(results: Results) -> list[Part]:
    ledger = results.ledger
    rows: list[list[Cell]] = []
    for trial in ledger.trials:
        report, run = ledger.best_report(trial.name), results.runs.get(trial.name)
        rows.append(
            [
                trial.name,
                results.space.config(trial.values, trial.name, repeat=trial.repeat).seed,  # it may be searched
                trial.status,
                ledger.epochs(trial.name),
                report.score if report else None,
                report.epoch if report else None,
                run.epoch_seconds if run else None,
                trial.failures,
                (run.record.run_id if run else None) or "",
            ]
        )
    columns = [
        Column("trial"),
        Column("seed"),
        Column("status"),
        Column("epochs"),
        Column(results.space.search.metric, 4, "highest value"),
        Column("at epoch", meaning="of the highest value"),
        Column("s / epoch", 2),
        Column("failures"),
        Column("MLflow run"),
    ]
    return [Heading("Trials"), Table("Trials, in the order of the search", columns, rows)] if rows else []


def _settings(results: Results) -> list[Part]:
    plan = describe_plan(results.space).removeprefix(dump_yaml(results.space.base)).strip()
    shared = Details("The settings that all trials share", [Code(dump_yaml(results.space.base))])
    return [Heading("Space"), Code(plan), shared]


def _value_cell(results: Results, outcome: Outcome, axis: int) -> Cell:
    value = value_of(results.space, outcome, results.space.axes[axis])
    return value if isinstance(value, int | float) and not isinstance(value, bool) else show_value(value)


def _status(outcome: Outcome) -> str:
    return show_status(outcome).replace(" ", "\u00a0")  # on one line, so that the rows of a wide table stay low


def _known(value: float | None) -> float | None:
    return None if value is None or value < 0 else value  # -1: there is no object of the size


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
