"""The end of a run: its status in the record and in MLflow, and the error that its caller gets.

Nothing here may hide the cause, so a record that cannot be read or written is a warning.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import TrainingFailedError

from pipeline.config import from_record
from pipeline.engine.memory import memory_advice
from pipeline.errors import CheckpointError, LostRunError, PipelineError, PreemptedError, RunError
from pipeline.files.storage import join
from pipeline.launch.failures import describe_failure, find_cause, is_killed
from pipeline.launch.ray_internals import list_failures
from pipeline.launch.snapshot import inspect_checkpoints
from pipeline.logs import get_logger
from pipeline.runs.record import RunRecord, read_record, write_run
from pipeline.tracking.run import finish_run

log = get_logger("run_end")


@contextmanager
def record_failure(record: RunRecord) -> Iterator[None]:
    """Run the `with` block; if it raises, give the run the matching status. The caller sets the status of a success.

    Raises:
        LostRunError: another process runs the run; then nothing is written.
        PreemptedError: the run stopped early, as it was asked to.
        PipelineError: training failed.
        KeyboardInterrupt: the user ended it.
        BaseException: a fault of this code, unchanged.
    """
    try:
        yield
    except LostRunError:
        raise
    except PreemptedError:
        finish(record, "PREEMPTED")
        raise
    except TrainingFailedError as error:
        finish(record, "FAILED")
        raise _cause(record, error) from error
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
    """Set the status of a run in its folder and, if it answers, in MLflow; returns the record."""
    ended = replace(reload_record(record), status=status)
    write_or_warn(ended)
    finish_run(from_record(record.config, record.folder).tracking.uri, record.run_id, status)
    return ended


def reload_record(record: RunRecord) -> RunRecord:
    """The record as the run has written it. If its file is gone or damaged, `record` with the newest checkpoint.

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
    """Write the record; a full disk is only a warning."""
    try:
        write_run(record)
    except OSError as error:
        log.warning("cannot write the record of run %s, which is %s: %s", record.folder, record.status, error)


def _explain(record: RunRecord, error: Exception) -> PipelineError:
    """The error for a run that ended without an error of a worker."""
    reason = next(iter(str(error).splitlines()), "") or repr(error)
    if isinstance(error, RayActorError):
        reason = f"Ray's controller of the run died (killed, out of memory, or its node is gone): {reason}"
    if isinstance(error, OutOfMemoryError):
        reason = f"{reason}; set {memory_advice(from_record(record.config, record.folder), on_gpu=False)}"
    return PipelineError(
        f"run {record.folder} ended: {reason}; the same command with --resume continues from the last checkpoint"
    )


def _cause(record: RunRecord, error: TrainingFailedError) -> PipelineError:
    """The project's error behind a failed run, or a PipelineError with one line about the failure."""
    failures = list_failures(error)
    if cause := find_cause(failures.values()):
        return cause
    text = f"training failed: {describe_failure(failures)}"
    if is_killed(failures.values()):
        text += f"; if memory ran out, set {memory_advice(from_record(record.config, record.folder), on_gpu=False)}"
    return PipelineError(text)
