"""How a run ended, in its record and in MLflow, whatever ended it and whatever has become of its files.

Nothing here may hide the cause: a record that cannot be read or written is a warning.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ray.exceptions import RayActorError, RayError
from ray.train import TrainingFailedError

from pipeline.config import from_record
from pipeline.errors import CheckpointError, PipelineError, PreemptedError, RunError
from pipeline.files.storage import join
from pipeline.launch.failures import cause_of, describe_failure
from pipeline.launch.snapshot import inspect_checkpoints
from pipeline.logs import get_logger
from pipeline.runs.record import RunRecord, read_record, write_run
from pipeline.tracking.run import finish_run

log = get_logger("run_end")


@contextmanager
def closing(record: RunRecord) -> Iterator[None]:
    """Inside, the run is RUNNING. An exception that leaves gives it the status that fits; the caller gives the others.

    Raises:
        PreemptedError: the run stopped early, as it was asked to.
        PipelineError: training failed.
        KeyboardInterrupt: it was ended by hand.
        BaseException: a fault of this code, as it is.
    """
    try:
        yield
    except PreemptedError:
        finish(record, "PREEMPTED")
        raise
    except TrainingFailedError as error:
        finish(record, "FAILED")
        raise _cause(error) from error
    except (KeyboardInterrupt, SystemExit):  # a second Ctrl-C; Ray's own answer to one is sys.exit
        finish(record, "KILLED")
        raise KeyboardInterrupt from None
    except (RayError, OSError) as error:
        finish(record, "FAILED")
        raise _explain(record, error) from error
    except BaseException:
        finish(record, "FAILED")
        raise


def finish(record: RunRecord, status: str) -> RunRecord:
    """The record, with `status`, as it is now also in the run's folder and, as far as it answers, in MLflow."""
    ended = replace(newest(record), status=status)
    write_or_warn(ended)
    finish_run(from_record(record.config, record.folder).tracking.uri, record.run_id, status)
    return ended


def newest(record: RunRecord) -> RunRecord:
    """The record as the run has left it; if its file is gone or damaged, `record` with the newest checkpoint there is.

    Args:
        record: as the driver wrote it at the start.
    """
    try:
        return read_record(record.folder)
    except (OSError, RunError) as error:
        log.warning("the record of run %s is written again: %s", record.folder, error)
    try:
        usable = inspect_checkpoints(record.folder, stored_before=False).usable
    except (OSError, CheckpointError) as error:
        log.warning("the checkpoints of run %s cannot be read: %s", record.folder, error)
        return record
    return replace(record, last=join(record.folder, usable[-1].name) if usable else None)


def write_or_warn(record: RunRecord) -> None:
    """Write the record; a full disk is a warning."""
    try:
        write_run(record)
    except OSError as error:
        log.warning("cannot write the record of run %s, which is %s: %s", record.folder, record.status, error)


def _explain(record: RunRecord, error: Exception) -> PipelineError:
    """The error of a run that no worker has ended."""
    reason = next(iter(str(error).splitlines()), "") or repr(error)
    if isinstance(error, RayActorError):
        reason = f"Ray's controller of the run died (killed, out of memory, or its node is gone): {reason}"
    return PipelineError(
        f"run {record.folder} ended: {reason}; the same command with --resume goes on from the last checkpoint"
    )


def _cause(error: TrainingFailedError) -> PipelineError:
    """The error of ours behind a failed run, or one that says in a line what failed."""
    failures = dict(getattr(error, "worker_failures", {})) or {0: getattr(error, "controller_failure", error)}
    return cause_of(failures.values()) or PipelineError(f"training failed: {describe_failure(failures)}")
