"""All errors that the pipeline raises on purpose: one class per cause. Messages name the setting or command that helps.

Commands print the message without a traceback and exit with the class's `exit_code`. It is 2 if the input was wrong and
nothing was started, and 1 if a started run failed. It is 75 if a run was asked to stop; the same command continues it.
All errors can be pickled, because Ray sends them between processes.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager


class PipelineError(Exception):
    """A fault that the user can fix; `str(error)` says how."""

    exit_code = 1


class InputError(PipelineError):
    """The request is wrong and was not started."""

    exit_code = 2


class ConfigError(InputError):
    """A config file or override is wrong; the message lists all faults at once."""


class AnnotationError(InputError):
    """An annotation or results file is not valid COCO JSON, or its images cannot be used."""


class DetectionError(InputError):
    """Detections cannot be scored: not finite, of unknown images or categories, or an image was evaluated twice."""


class ShardError(InputError):
    """A shard folder, its index or one of its tars is missing, damaged or of another version."""


class ResourceError(InputError):
    """More CPUs, GPUs or disk space were requested than exist."""


class RunError(InputError):
    """A run name is already used, or the requested run does not exist."""


class LostRunError(PipelineError):
    """Another process has taken over the run, because this one was suspended for long."""


class CheckpointError(InputError):
    """A checkpoint or weights file is missing, damaged, or belongs to another model or format."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint is complete, but this code does not read its version; it must not be skipped."""


class StorageError(PipelineError):
    """A checkpoint or another result cannot be written: the disk is full, or the storage refuses it."""


class DiskFullError(StorageError):
    """There is no space for a checkpoint; another attempt would fail too."""


def is_disk_full(error: Exception) -> bool:
    """Whether a file system, a store or a library had no space; some give the reason only as text."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or re.search(r"No space left on device|Disk quota exceeded", str(error)) is not None


def storage_error(message: str, error: Exception) -> StorageError:
    """The StorageError for an error of a file system, a store or a library."""
    return DiskFullError(message) if is_disk_full(error) else StorageError(message)


class MemoryFullError(PipelineError):
    """Training needs more memory than there is; another attempt would fail too."""


class ExportError(InputError):
    """A model cannot be exported: its kind, a missing package, or different results of the exported graph."""


class OpError(InputError):
    """The MSDeformAttn operator got unsupported tensors, or could not be built."""


class NonFiniteError(PipelineError):
    """Training had too many consecutive non-finite losses."""


class PreemptedError(PipelineError):
    """The run was asked to stop and did, with a checkpoint; `--resume=auto` continues it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class DriftError(PipelineError):
    """The ranks of a run have different weights."""


class WorkersLostError(PipelineError):
    """Too many worker processes of an evaluation or a prediction died."""


class ServingError(PipelineError):
    """The replicas of a server do not start, or it has ended by itself."""


class SweepError(PipelineError):
    """No trial of a sweep has a result."""


class TrackingError(PipelineError):
    """MLflow could not be reached for something that needs it; training itself continues without MLflow."""


class TrackingInputError(TrackingError, InputError):
    """MLflow answers but refuses the request, or its store cannot be used; waiting does not help."""

    exit_code = 2


@contextmanager
def after_start() -> Iterator[None]:
    """Mark started work: an InputError in this context, such as a damaged shard, exits with 1 instead of 2."""
    try:
        yield
    except InputError as error:
        error.exit_code = 1
        raise
