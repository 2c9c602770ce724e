"""What lies behind the failures of workers that Ray reports: the error of this project, or one line."""

from collections.abc import Iterable, Mapping

from ray.exceptions import OutOfMemoryError, RayActorError

from pipeline.errors import PipelineError


def cause_of(errors: Iterable[BaseException]) -> PipelineError | None:
    """The first PipelineError among `errors`, what Ray has wrapped in them, and their causes."""
    for error in errors:
        inner: BaseException | None = getattr(error, "cause", error)
        while inner is not None:
            if isinstance(inner, PipelineError):
                return inner
            inner = inner.__cause__
    return None


def describe_failure(errors: Mapping[int, BaseException]) -> str:
    """One line on why workers failed, by rank: an error of this project where there is one, else the most telling."""
    cause = cause_of(errors.values())
    if cause is not None:
        return _first_line(cause)
    if not errors:
        return "no worker said why"
    # Ray 2.60 wraps what its question after a worker's health met
    errors = {rank: getattr(error, "health_check_failure", error) for rank, error in errors.items()}
    died = {rank: error for rank, error in errors.items() if isinstance(error, RayActorError | OutOfMemoryError)}
    rank, error = next(iter((died or errors).items()))  # the others fail because one has died
    if isinstance(error, OutOfMemoryError):
        return f"Ray ended the worker of rank {rank}: its node was out of memory"
    if isinstance(error, RayActorError):
        return f"the worker of rank {rank} died (killed, out of memory, or its node is gone)"
    return f"rank {rank}: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or repr(error)
