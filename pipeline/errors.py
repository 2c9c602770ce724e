"""Every error the pipeline raises on purpose: a class per cause, each message naming the knob or command that mends it.

Used by all modules; `jobs.cli.main` prints the message without a traceback and exits with the class's `exit_code`:
2 where the input was wrong and nothing was started, 1 where a started run failed, 75 where it was told to leave and
the same command goes on. All of them pickle, because Ray carries them between processes.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager


class PipelineError(Exception):
    """A fault the user can mend; `str(error)` says how."""

    exit_code = 1


class InputError(PipelineError):
    """The request cannot be started as it stands."""

    exit_code = 2


class ConfigError(InputError):
    """A config file or override is wrong; the message lists all faults at once."""


class AnnotationError(InputError):
    """An annotation or results file is not the COCO JSON it should be."""


class DetectionError(InputError):
    """Detections cannot be scored: not finite, of unknown images or categories, or an image was evaluated twice."""


class ShardError(InputError):
    """A shard folder, its index or one of its tars is missing, damaged or of another version."""


class ResourceError(InputError):
    """More CPUs, GPUs or disk were asked for than there are."""


class RunError(InputError):
    """A run name is taken, or the run that was asked for does not exist."""


class CheckpointError(InputError):
    """A checkpoint or weights file is missing, damaged, or belongs to another model or format."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint is whole, but of a version that this code does not read: nothing that may be passed over."""


class StorageError(PipelineError):
    """A checkpoint or another result cannot be written: the disk is full, or the storage does not take it."""


class DiskFullError(StorageError):
    """There is no room for a checkpoint: another try would meet the same."""


def is_disk_full(error: Exception) -> bool:
    """Whether a file system, a store or a library had no room; some give the reason as text alone."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or re.search(r"No space left on device|Disk quota exceeded", str(error)) is not None


def storage_error(message: str, error: Exception) -> StorageError:
    """The StorageError for what a file system, a store or a library said."""
    return DiskFullError(message) if is_disk_full(error) else StorageError(message)


class ExportError(InputError):
    """A model cannot be exported: its kind, a missing package, or the exported graph computes something else."""


class OpError(InputError):
    """The MSDeformAttn operator got tensors it cannot take, or could not be built."""


class NonFiniteError(PipelineError):
    """Training met too many non-finite losses in a row."""


class PreemptedError(PipelineError):
    """The run was told to leave and did, with a checkpoint; it goes on with `--resume=auto`."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class DriftError(PipelineError):
    """The ranks of a run no longer have the same weights."""


class SweepError(PipelineError):
    """No trial of a sweep came to a result."""


class TrackingError(PipelineError):
    """MLflow could not be reached for something that needs it (training itself goes on without)."""


class TrackingInputError(TrackingError, InputError):
    """MLflow answers, but refuses the request, or its store cannot be used as it stands: no outage to wait for."""

    exit_code = 2


@contextmanager
def after_start() -> Iterator[None]:
    """Inside, work has been started: an InputError that it meets, such as a damaged shard, exits with 1, not with 2."""
    try:
        yield
    except InputError as error:
        error.exit_code = 1
        raise
