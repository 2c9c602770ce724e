"""What a sweep's report is made of: the ledger, and of each trial its evaluations, its cost and its MLflow run.

Everything is read from the sweep's folder, of a sweep that has ended, that was killed, or that is still running. A
name that is wrong, a folder without a ledger and a ledger of another version are a RunError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pipeline.errors import RunError
from pipeline.files.folder_lock import read_owner
from pipeline.files.storage import exists, is_url, join, make_absolute
from pipeline.runs.evaluations import Entry, read_evaluations
from pipeline.runs.record import RunRecord, read_record, run_exists, with_store_beside
from pipeline.training.monitoring.steplog import read_epoch_seconds
from tune.results.outcomes import Outcome, outcomes_of
from tune.search.ledger import FILE, Ledger, Report, Trial, read_ledger, space_of
from tune.space import Space
from tune.trials.on_disk import recover


@dataclass(frozen=True)
class TrialRun:
    """The run of a trial on disk."""

    record: RunRecord
    entry: Entry | None = None  # COCO numbers of the evaluation with the trial's highest score
    epoch_seconds: float | None = None  # median over its last epochs, without evaluation; None without a whole epoch


@dataclass(frozen=True)
class Cost:
    """What a trial's model costs."""

    parameters: int  # with frozen ones
    multiply_adds: float  # of one image in evaluation


@dataclass(frozen=True)
class Results:
    """A sweep, read whole."""

    space: Space  # with `storage` set to the sweep's folder
    ledger: Ledger  # with what the runs did after it was last written
    written: Ledger  # as it was written
    runs: Mapping[str, TrialRun] = field(default_factory=dict)  # by the trial's name; of those that have started
    costs: Mapping[str, Cost] = field(default_factory=dict)  # by the trial's name
    cost_fault: str = ""  # why there are no costs
    runner: str = ""  # the other process that runs the sweep, as text; empty if none does

    @property
    def folder(self) -> str:
        """The sweep's folder, a path or URL."""
        return self.space.base.storage

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """One outcome per point, in their order."""
        return outcomes_of(self.space, self.ledger)

    def trials_of(self, outcome: Outcome) -> Sequence[Trial]:
        """The repeats of an outcome's point."""
        return self._trials[outcome.name]

    @cached_property
    def _trials(self) -> dict[str, Sequence[Trial]]:
        points = zip(self.outcomes, self.ledger.points, strict=True)
        return {outcome.name: self.ledger.of_point(point) for outcome, point in points}

    @property
    def record(self) -> RunRecord:
        """The sweep's parent run in MLflow, like the record of a run."""
        config = with_store_beside(self.written.config, self.written.config["storage"], self.folder)
        return RunRecord(self.space.base.name, self.folder, config, self.written.run_id)


def find_sweep(sweep: str) -> str:
    """The folder of a sweep, absolute or a URL.

    Args:
        sweep: its folder, its `sweep.json`, or its name under `runs/`.

    Raises:
        RunError: there is none; the message lists those that exist.
    """
    folders = [sweep.removesuffix(f"/{FILE}").rstrip("/") or "/", join("runs", sweep)]
    try:
        found = next((folder for folder in folders if exists(join(folder, FILE))), None)
        if found is not None:
            return make_absolute(found)
        if run := next((folder for folder in folders if run_exists(folder)), None):
            raise RunError(f"{run} is a training run, not a sweep; `python -m jobs.analyse {run}` reports it")
    except OSError as error:
        raise RunError(f"cannot read {sweep}: {error}; check the address and your access") from None
    if sweep.endswith((".yaml", ".yml")):
        raise RunError(f"{sweep} is a space file; give the folder of its sweep, such as runs/NAME")
    parent = Path(sweep).parent if "/" in sweep and not is_url(sweep) else Path("runs")
    known = ", ".join(sorted(path.parent.name for path in parent.glob(f"*/{FILE}"))) or "none"
    raise RunError(f"there is no sweep '{sweep}' (no {join(sweep, FILE)}); sweeps in {parent}: {known}")


def read_results(folder: str) -> Results:
    """Read the sweep in `folder`, as `find_sweep` names it; without costs.

    Raises:
        RunError: its ledger or the record of a trial is damaged or of another version.
        ConfigError: its config is one that today's code does not read.
    """
    try:
        written = read_ledger(folder)
        if written is None:
            raise RunError(f"there is no sweep in {folder} (no {FILE})")
        space = space_of(written, folder)
        ledger = recover(space, written, folder)
        runs = {trial.name: join(folder, trial.name) for trial in ledger.trials}
        started = {name: run for name, run in runs.items() if run_exists(run)}
        rows = {name: _read_rows(run, space, ledger, name) for name, run in started.items()}
        ledger = _verified(space, ledger, rows)
        found = {name: _read_run(run, ledger, name, rows[name]) for name, run in started.items()}
        owner = read_owner(folder)
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error}; check the address and your access") from None
    others = owner is not None and owner.is_alive is not False and not owner.is_this_process
    return Results(space, ledger, written, found, runner=str(owner) if others else "")


def add_costs(results: Results) -> Results:
    """The results with the parameters and multiply-adds of each trial; a fault is noted, not raised."""
    from tune.results.costs import find_costs  # loads PyTorch

    try:
        return replace(results, costs=find_costs(results.space, results.ledger.trials))
    except Exception as error:  # shards that were removed, a model that today's code does not build
        return replace(results, cost_fault=str(error).strip() or repr(error))


def _read_rows(run: str, space: Space, ledger: Ledger, name: str) -> dict[int, Entry]:
    """The COCO numbers of a trial's evaluations by step; with pbt without the rows that came with a checkpoint."""
    known = {report.step: report.score for report in ledger.reports if report.trial == name}
    metric = space.search.metric.removeprefix("val/")
    rows = {int(row.entry["step"]): row.entry for row in read_evaluations(run)}
    exchanged = space.search.early_stop == "pbt"
    return {step: row for step, row in rows.items() if not exchanged or known.get(step) == row.get(metric)}


def _verified(space: Space, ledger: Ledger, rows: Mapping[str, Mapping[int, Entry]]) -> Ledger:
    """The ledger with the scores that stand, where pycocotools found others after the sweep had got them."""
    metric = space.search.metric.removeprefix("val/")

    def verify(report: Report) -> Report:
        return replace(report, score=rows.get(report.trial, {}).get(report.step, {}).get(metric, report.score))

    return replace(ledger, reports=tuple(map(verify, ledger.reports)))


def _read_run(run: str, ledger: Ledger, name: str, rows: Mapping[int, Entry]) -> TrialRun:
    report = ledger.best_report(name)
    return TrialRun(
        read_record(run), rows.get(report.step) if report else None, read_epoch_seconds(run, ledger.epochs(name))
    )
