"""The ledger of a sweep, `<sweep>/sweep.json`: its space, its trials with their values, and how each ended.

A sweep that was killed continues from this file alone. It is written after every event, by rename. All functions here
are pure except `read_ledger` and `write_ledger`. A file that is damaged or of another version is a RunError.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.config import changed_for_resume, dump, from_record
from pipeline.config.compare import recipe_settings
from pipeline.errors import RunError
from pipeline.files.storage import join, read_bytes, write_bytes
from tune.settings import Domain, Search
from tune.space import VARIANT, Axis, Space

FILE = "sweep.json"
VERSION = 1
FAULTS = 3  # of a file, that a message names
OTHER_CODE = "use the code that wrote it, or start a new sweep with name="
# `waiting` trials are to be started, or started again: after a failure, or because the sweep was killed. `paused` ones
# wait for the others of their population (pbt).
Status = Literal["waiting", "running", "paused", "finished", "stopped early", "failed"]
ENDED = ("finished", "stopped early", "failed")
# Settings of the search that a resumed sweep may change: they end it later or earlier, and choose no values.
CHANGEABLE = {"samples", "epochs", "minutes", "concurrent", "trial_failures"}
Bundles = dict[str, dict[str, Any]]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Trial:
    """A trial: one training run with the values of its point."""

    name: str  # of its run
    point: int  # number of the point in the order of the search
    repeat: int  # added to the seed
    values: Mapping[str, Any]  # axis label -> value
    status: Status = "waiting"
    failures: int = 0
    error: str = ""  # the cause of its last failure
    takes: str = ""  # pbt: the trial whose checkpoint it has to get before it continues


@dataclass(frozen=True)
class Report:
    """An evaluation of a trial."""

    trial: str
    epoch: int  # trained so far, the one of this evaluation included
    step: int  # optimizer steps so far
    score: Finite


@dataclass(frozen=True)
class Exchange:
    """pbt: a trial continued from the checkpoint of another one, with other values."""

    epoch: int
    trial: str
    donor: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Ledger:
    """All that a sweep has to remember."""

    config: dict[str, Any]  # the base config, as `dump` gives it
    search: dict[str, Any]
    axes: list[dict[str, Any]]
    data: dict[str, str] = field(default_factory=dict)  # digests of the shards of `train` and `val`
    run_id: str | None = None  # MLflow run of the sweep
    seconds: Finite = 0.0  # for which the sweep has run, over all its starts
    trials: tuple[Trial, ...] = ()
    reports: tuple[Report, ...] = ()  # in the order of arrival
    generation: int = 0  # pbt: number of exchanges of the population
    exchanges: tuple[Exchange, ...] = ()

    def trial(self, name: str) -> Trial:
        """The trial of this name."""
        return next(trial for trial in self.trials if trial.name == name)

    def with_status(self, *statuses: Status) -> list[Trial]:
        """The trials that have one of these statuses, in their order."""
        return [trial for trial in self.trials if trial.status in statuses]

    def of_point(self, point: int) -> list[Trial]:
        """The repeats of a point."""
        return [trial for trial in self.trials if trial.point == point]

    @property
    def points(self) -> list[int]:
        """The numbers of the points that have trials."""
        return sorted({trial.point for trial in self.trials})

    def epochs(self, name: str) -> int:
        """The largest number of epochs after which the trial was evaluated; 0 without an evaluation."""
        return max((report.epoch for report in self.reports if report.trial == name), default=0)

    def best_report(self, name: str) -> Report | None:
        """The evaluation with the trial's highest score, the first of equals; None without one.

        With pbt one after its last exchange: what it had trained before is gone.
        """
        since = max((each.epoch for each in self.exchanges if each.trial == name), default=0)
        reports = (report for report in self.reports if report.trial == name and report.epoch > since)
        return max(reports, key=lambda report: report.score, default=None)

    def score(self, name: str) -> float | None:
        """The score of `best_report`."""
        report = self.best_report(name)
        return report.score if report else None


def new_ledger(space: Space, data: Mapping[str, str]) -> Ledger:
    """The ledger of a sweep that has not started."""
    return Ledger(dump(space.base), _search_of(space), _axes_of(space), dict(data))


def space_of(ledger: Ledger, folder: str) -> Space:
    """The space of a sweep, from its ledger alone; `storage` is the sweep's folder, to which it may have been moved.

    Raises:
        RunError: today's code does not read its settings; or ConfigError: its config.
    """
    path = join(folder, FILE)
    try:
        search = Search.model_validate(ledger.search)
        axes = tuple(_read_axis(dict(each)) for each in ledger.axes)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} has settings that this code does not read ({_line(error)}); {OTHER_CODE}") from None
    base = from_record(ledger.config, path)
    return Space(base.model_copy(update={"storage": folder}), search, axes)


def add_point(ledger: Ledger, sweep: str, point: int, values: Mapping[str, Any], repeats: int) -> Ledger:
    """Add the trials of a point, as waiting ones."""
    added = [Trial(name, point, repeat, values) for repeat, name in enumerate(trial_names(sweep, point, repeats))]
    return replace(ledger, trials=(*ledger.trials, *added))


def trial_names(sweep: str, point: int, repeats: int) -> list[str]:
    """The names of the trials of a point."""
    return [f"{sweep}-{point:03d}" + (f"-{repeat}" if repeats > 1 else "") for repeat in range(repeats)]


def best_name(sweep: str) -> str:
    """The name of the run that trains the best point again."""
    return f"{sweep}-best"


def clear_takes(ledger: Ledger, name: str) -> Ledger:
    """Note that a trial has got the checkpoint that it continues from."""
    return _change(ledger, name, takes="")


def start_trial(ledger: Ledger, name: str) -> Ledger:
    """Mark a waiting trial as running."""
    return _change(ledger, name, status="running")


def end_trial(ledger: Ledger, name: str, status: Status) -> Ledger:
    """Set how a trial ended. A trial that has ended before stays as it is."""
    return ledger if ledger.trial(name).status in ENDED else _change(ledger, name, status=status)


def fail_trial(ledger: Ledger, name: str, error: str, limit: int) -> Ledger:
    """Note a failure of a trial. It waits to be started again, up to `limit` times; after that it has failed."""
    trial = ledger.trial(name)
    if trial.status in ENDED:
        return ledger
    status: Status = "waiting" if trial.failures < limit else "failed"
    return _change(ledger, name, status=status, failures=trial.failures + 1, error=error)


def add_report(ledger: Ledger, report: Report) -> Ledger:
    """Add an evaluation. One of a step that the trial has already reported is left out, as after a resume."""
    known = {(each.trial, each.step) for each in ledger.reports}
    return ledger if (report.trial, report.step) in known else replace(ledger, reports=(*ledger.reports, report))


def read_report(trial: str, entry: Mapping[str, float], metric: str) -> Report | None:
    """The report of a row of `evaluations.json`; None if no object of the metric's size was there to be found.

    Args:
        trial: its name.
        entry: the row's numbers.
        metric: of the search, such as `val/AP`.
    """
    score = entry[metric.removeprefix("val/")]
    return Report(trial, int(entry["epoch"]) + 1, int(entry["step"]), score) if score >= 0 else None


def interrupt_running(ledger: Ledger) -> Ledger:
    """Mark the trials that were running when the sweep died as waiting."""
    trials = [replace(each, status="waiting") if each.status == "running" else each for each in ledger.trials]
    return replace(ledger, trials=tuple(trials))


def check_same_space(ledger: Ledger, space: Space, data: Mapping[str, str], folder: str) -> None:
    """Refuse to continue a sweep with settings that make its trials incomparable.

    Raises:
        RunError: with each setting that differs.
    """
    before, now = from_record(ledger.config, f"{folder}/{FILE}"), space.base
    changed = changed_for_resume(before, now)
    old, new = recipe_settings(before), recipe_settings(now)
    changed |= {key: (old[key], new[key]) for key in new if old[key] != new[key]}
    search = _search_of(space)
    for key in sorted(search.keys() - CHANGEABLE):
        if ledger.search.get(key) != search[key]:
            changed[f"search.{key}"] = (ledger.search.get(key), search[key])
    lines = [f"{key} was {old}, is {new}" for key, (old, new) in changed.items()]
    axes = {each["label"]: each for each in _axes_of(space)}
    known = {each["label"]: each for each in ledger.axes}
    lines += [
        f"space.{label} differs" for label in sorted(axes.keys() | known.keys()) if axes.get(label) != known.get(label)
    ]
    if axes.keys() == known.keys() and [*axes] != [*known]:  # random numbers and combinations go by the order
        lines.append(f"the settings of space were in the order {'; '.join(known)}")
    lines += [f"data.{split} has other shards" for split in data if ledger.data.get(split) != data[split]]
    if lines:
        raise RunError(f"sweep {folder} cannot be continued: {'; '.join(lines)}; give the old values or a new name=")


def read_ledger(folder: str) -> Ledger | None:
    """The ledger in the sweep's folder (path or URL); None if there is none.

    Raises:
        RunError: it is damaged or of another version.
    """
    path = join(folder, FILE)
    try:
        return parse_ledger(read_bytes(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is not a ledger that this code reads ({_line(error)}); {OTHER_CODE}") from None


def write_ledger(folder: str, ledger: Ledger) -> None:
    """Write the ledger; a reader never sees half of it. Raises OSError."""
    write_bytes(join(folder, FILE), format_ledger(ledger))


def parse_ledger(content: bytes) -> Ledger:
    """The ledger in a file's bytes. Raises ValueError, TypeError, KeyError or AttributeError if it is none."""
    document = json.loads(content)
    version = document.pop("version")
    if version != VERSION:
        raise ValueError(f"version {version} instead of {VERSION}")
    trials = tuple(Trial(**each) for each in document.pop("trials"))
    reports = tuple(Report(**each) for each in document.pop("reports"))
    exchanges = tuple(Exchange(**each) for each in document.pop("exchanges"))
    ledger = Ledger(**document, trials=trials, reports=reports, exchanges=exchanges)  # refuses unknown keys
    ledger = TypeAdapter(Ledger).validate_python(dataclasses.asdict(ledger))  # and this other types
    _check_parts(ledger)
    return ledger


def _check_parts(ledger: Ledger) -> None:
    """Raises ValueError, TypeError or KeyError if parts do not fit together, or the config lacks what every one has."""
    for value in (ledger.config["name"], ledger.config["storage"], ledger.config["tracking"]["uri"]):
        if not isinstance(value, str):
            raise ValueError(f"config: {value!r} is no text")
    axes = {axis.label: axis for axis in (_read_axis(dict(each)) for each in ledger.axes)}
    names = {trial.name for trial in ledger.trials}
    given = [(trial.name, trial.values) for trial in ledger.trials]
    given += [(each.trial, each.values) for each in ledger.exchanges]
    for name, values in given:
        if values.keys() != axes.keys():
            raise ValueError(f"the values of trial {name} are not those of the space")
        if other := next((label for label, axis in axes.items() if not axis.domain.holds(values[label])), None):
            raise ValueError(f"{other} of trial {name} is {values[other]!r}, which the space does not have")
    named = [report.trial for report in ledger.reports]
    named += [name for each in ledger.exchanges for name in (each.trial, each.donor)]
    named += [trial.takes for trial in ledger.trials if trial.takes]
    if unknown := next((name for name in named if name not in names), None):
        raise ValueError(f"there is no trial {unknown}")


def format_ledger(ledger: Ledger) -> bytes:
    """The file that `parse_ledger` reads."""
    return json.dumps({"version": VERSION, **dataclasses.asdict(ledger)}, indent=1).encode()


def _line(error: Exception) -> str:
    """The message of an error on one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:FAULTS])
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _change(ledger: Ledger, name: str, **changes: Any) -> Ledger:
    trials = [replace(trial, **changes) if trial.name == name else trial for trial in ledger.trials]
    return replace(ledger, trials=tuple(trials))


def _search_of(space: Space) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(space.search.model_dump_json())
    return document | {"scheduler": space.search.early_stop}


def _axes_of(space: Space) -> list[dict[str, Any]]:
    axes: Sequence[dict[str, Any]] = [
        {"label": axis.label, "bundles": axis.bundles, **axis.domain.model_dump(exclude_none=True)}
        for axis in space.axes
    ]
    document: list[dict[str, Any]] = json.loads(json.dumps(axes))
    return document


def _read_axis(document: dict[str, Any]) -> Axis:
    label, bundles = document.pop("label"), TypeAdapter(Bundles).validate_python(document.pop("bundles"))
    keys = (VARIANT,) if bundles else tuple(label.split(", "))
    return Axis(keys, Domain.model_validate(document), bundles)
