"""The cause of the worker failures that Ray reports: an error of this project, or one line of text. Never fails."""

from collections.abc import Iterable, Mapping

from ray.exceptions import OutOfMemoryError, RayActorError

from pipeline.errors import PipelineError
from pipeline.launch.ray_internals import unwrap_failure


def find_cause(errors: Iterable[BaseException]) -> PipelineError | None:
    """The first PipelineError among `errors`, what Ray has wrapped in them, and their causes."""
    for error in errors:
        inner: BaseException | None = getattr(error, "cause", error)
        while inner is not None:
            if isinstance(inner, PipelineError):
                return inner
            inner = inner.__cause__
    return None


def is_killed(errors: Iterable[BaseException]) -> bool:
    """Whether a worker's process was ended from outside: by Ray's memory monitor, the system, or with its node."""
    return any(isinstance(unwrap_failure(error), RayActorError | OutOfMemoryError) for error in errors)


def describe_failure(errors: Mapping[int, BaseException]) -> str:
    """One line that says why workers failed: the error of this project if there is one, else that of a worker.

    Args:
        errors: by rank.
    """
    cause = find_cause(errors.values())
    if cause is not None:
        return _first_line(cause)
    if not errors:
        return "no worker gave a reason"
    errors = {rank: unwrap_failure(error) for rank, error in errors.items()}
    died = {rank: error for rank, error in errors.items() if isinstance(error, RayActorError | OutOfMemoryError)}
    rank, error = next(iter((died or errors).items()))  # when a worker dies, the others fail in their collectives
    if isinstance(error, OutOfMemoryError):
        return f"Ray ended the worker of rank {rank}: its node was out of memory"
    if isinstance(error, RayActorError):
        return f"the worker of rank {rank} died (killed, out of memory, or its node is gone)"
    return f"rank {rank}: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or repr(error)
