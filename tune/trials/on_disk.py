"""The runs of a sweep's trials on disk: what they hold after a kill, and what is removed when they have ended.

A trial is a run of the product, so its `run.json` and `evaluations.json` say what it did.
"""

from dataclasses import replace

from pipeline.errors import RunError
from pipeline.files.storage import copy_folder, join, remove, subfolders
from pipeline.logs import get_logger
from pipeline.runs.evaluations import read_evaluations, write_evaluations
from pipeline.runs.record import CHECKPOINT_LIST, CHECKPOINT_NAME, read_record, read_run, run_exists, write_run
from pipeline.tracking.run import finish_run
from tune.search.ledger import ENDED, Ledger, read_report
from tune.search.plan import RunState, reconcile
from tune.search.sampling import best_point
from tune.space import Space

log = get_logger("sweep")


def recover(space: Space, ledger: Ledger, folder: str) -> Ledger:
    """The ledger of a sweep that was killed, with what its runs did after it was last written; only reads.

    Args:
        space: of the sweep.
        ledger: as it was read.
        folder: of the sweep, a path or URL.

    Raises:
        RunError: a run's record or evaluations are damaged.
    """
    runs: dict[str, RunState] = {}
    for trial in ledger.with_status("waiting", "running"):
        run = join(folder, trial.name)
        if run_exists(run):
            rows = (read_report(trial.name, row.entry, space.search.metric) for row in read_evaluations(run))
            runs[trial.name] = RunState(tuple(row for row in rows if row), is_finished(folder, trial.name))
    return reconcile(space, ledger, runs)


def is_finished(folder: str, name: str) -> bool:
    """Whether the run of a trial has trained to its end."""
    run = join(folder, name)
    return run_exists(run) and read_record(run).status == "FINISHED"


def losing_trials(ledger: Ledger) -> list[str]:
    """The names of the trials that have ended and do not belong to the best point."""
    best = best_point(ledger)
    return [trial.name for trial in ledger.trials if trial.status in ENDED and trial.point != best]


def keep_best_checkpoint(run: str) -> None:
    """Remove all checkpoints of a run but the best one, or the last one if none was evaluated. A fault is a warning.

    Args:
        run: its folder, a path or URL.
    """
    try:
        if not run_exists(run):
            return
        record = read_run(run)
        kept = record.best or record.last
        if kept is None:
            return
        name = kept.rpartition("/")[2]
        for other in subfolders(run):
            if CHECKPOINT_NAME.fullmatch(other) and other != name:
                remove(join(run, other))
        if record.last != kept:
            write_run(replace(record, last=kept))
    except (OSError, RunError) as error:
        log.warning("cannot remove the checkpoints of %s that are not needed any more: %s", run, error)


def take_checkpoint(donor: str, taker: str) -> None:
    """Replace all checkpoints of the run `taker` by the last one of the run `donor`, with its row of AP (pbt).

    Neither run is training. It can be repeated after a kill, as long as the donor has not trained on.

    Args:
        donor: the folder of a run, a path or URL.
        taker: another one.

    Raises:
        RunError: the donor has no checkpoint.
    """
    given, own = read_record(donor), read_record(taker)
    if given.last is None:
        raise RunError(f"run {donor} has no checkpoint to hand over")
    name = given.last.rpartition("/")[2]
    for other in subfolders(taker):
        if CHECKPOINT_NAME.fullmatch(other):
            remove(join(taker, other))
    remove(join(taker, CHECKPOINT_LIST))  # Ray's list; the next start writes it from the folders
    copy_folder(given.last, join(taker, name))
    rows = [replace(row, checkpoint="") for row in read_evaluations(taker)]
    write_evaluations(taker, [*rows, *(row for row in read_evaluations(donor) if row.checkpoint == name)])
    write_run(replace(own, last=join(taker, name)))


def close_ended_runs(ledger: Ledger, folder: str, tracking_uri: str) -> None:
    """Set the status of runs whose trial no longer runs but had no time to write it. A fault is a warning."""
    for trial in ledger.trials:
        run = join(folder, trial.name)
        try:
            if not run_exists(run) or (record := read_record(run)).status != "RUNNING":
                continue
            status = "FAILED" if trial.status == "failed" else "KILLED"
            write_run(replace(record, status=status))
            finish_run(tracking_uri, record.run_id, status)
        except (OSError, RunError) as error:
            log.warning("cannot close the run %s: %s", run, error)
