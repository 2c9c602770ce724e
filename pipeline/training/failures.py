"""The error of ours behind what Ray reports of failed workers; used by `recording.py` and `driver.py`."""

from collections.abc import Iterable

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
