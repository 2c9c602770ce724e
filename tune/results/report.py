"""The report of a sweep: its page and plots in its folder and in MLflow, the best config.

It works on a sweep in any state and may be repeated. Raises RunError and ConfigError for a sweep that cannot be read
and StorageError for a folder that cannot be written. A failure of MLflow is a warning.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.errors import PreemptedError, StorageError
from pipeline.files.scratch import scratch_folder
from pipeline.files.storage import error_reason, exists, join, write_bytes
from pipeline.logs import get_logger
from pipeline.pages.figures import to_png
from pipeline.pages.render import render
from pipeline.tracking.logger import REPORT_SECONDS, RunLogger
from pipeline.tracking.store import choose_store
from tune.results.importance import find_importance
from tune.results.outcomes import best_config, find_best, write_best
from tune.results.page import build_page
from tune.results.plots import plots_of
from tune.results.source import Results, add_costs, read_results
from tune.search.ledger import FILE

FOLDER, PAGE = "report", "index.html"  # in the sweep's folder and among the parent run's artifacts
PARAMETERS, MULTIPLY_ADDS, EPOCH_SECONDS = "model/parameters", "model/multiply_adds", "perf/epoch_s"

log = get_logger("report")


@dataclass(frozen=True)
class Written:
    """A report that was written."""

    results: Results
    page: str  # path or URL
    logged: bool  # whether MLflow has it


def report_sweep(folder: str, tracking_uri: str | None = None) -> Written:
    """Write the page, the plots and `best.yaml`, and log them in the parent run.

    The trials' runs get their parameters, multiply-adds and seconds per epoch as metrics, so that MLflow compares them.

    Args:
        folder: of the sweep, from `source.find_sweep`.
        tracking_uri: `--tracking-uri`; by default the sweep's own store.
    """
    results = add_costs(read_results(folder))
    uri = choose_store(tracking_uri, record=results.record).uri
    plots = plots_of(results, importance := find_importance(results.space, results.outcomes))
    files = {PAGE: render(build_page(results, importance, plots)).encode()}
    files |= {f"{name}.png": to_png(plot.draw, plot.size) for name, plot in plots.items()}
    winner = find_best(results.outcomes)
    try:
        for name, content in files.items():
            write_bytes(join(folder, f"{FOLDER}/{name}"), content)
        if winner:
            write_best(results.space, winner, folder)
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}/{FOLDER}: {error_reason(error)}; check the disk and access"
        ) from None
    with scratch_folder("report") as scratch, RunLogger(uri, results.written.run_id) as logger:
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        logger.artifact(scratch, FOLDER)
        if winner:
            logger.text(best_config(results.space, winner), "best.yaml")
        logged = results.written.run_id is not None and logger.flush(REPORT_SECONDS)
    if logged:
        _log_costs(results, uri)
    return Written(results, join(folder, f"{FOLDER}/{PAGE}"), logged)


@contextmanager
def report_at_end(folder: str) -> Iterator[None]:
    """Report the sweep in `folder` when the context ends, also after Ctrl-C and failures. A fault is a warning.

    After SIGTERM there is no time for it.
    """
    try:
        yield
    except PreemptedError:
        raise
    except BaseException:
        _try_report(folder)
        raise
    _try_report(folder)


def _log_costs(results: Results, uri: str) -> None:
    """Log the numbers of the page that the trials' runs do not have yet."""
    for trial in results.ledger.trials:
        run, report = results.runs.get(trial.name), results.ledger.best_report(trial.name)
        if run is None or run.record.run_id is None:
            continue
        numbers = {EPOCH_SECONDS: run.epoch_seconds} if run.epoch_seconds is not None else {}
        if cost := results.costs.get(trial.name):
            numbers |= {PARAMETERS: cost.parameters, MULTIPLY_ADDS: cost.multiply_adds}
        with RunLogger(uri, run.record.run_id) as logger:
            logger.metrics(numbers, report.step if report else 0)
            if not logger.flush():
                return  # it has warned


def _try_report(folder: str) -> None:
    try:
        if exists(join(folder, FILE)):
            print(f"page: {report_sweep(folder).page}")
    except Exception as error:  # stores, matplotlib, a full disk; the sweep itself is over
        again = f"`{shlex.join(['python', '-m', 'tune.report', folder])}` makes it again"
        log.warning("the report of the sweep is incomplete: %s; %s", str(error).strip() or repr(error), again)
