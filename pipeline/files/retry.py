"""Retries of calls to remote stores: exponential backoff with full jitter, at most ATTEMPTS attempts.

An error that would occur again is raised at once: no such file, no permission, no login, no reader, a full disk. Any
other error is raised unchanged after the last attempt.
"""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import PipelineError, is_disk_full

T = TypeVar("T")

ATTEMPTS = 6
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.2, 10.0  # upper bounds of a pause; all five take 3 seconds on average
PERMANENT = (
    *(FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, NotImplementedError, PipelineError),
)
# The errors of S3's and Google's clients where no login is found; importing their packages would take seconds.
WITHOUT_LOGIN = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
_jitter = random.Random()  # not the global generator, which training may have seeded


def is_permanent(error: BaseException) -> bool:
    """Whether another attempt would fail with the same error."""
    if isinstance(error, PERMANENT) or type(error).__name__ in WITHOUT_LOGIN:
        return True
    return isinstance(error, Exception) and is_disk_full(error)


def call_with_retries(action: Callable[[], T]) -> T:
    """Return the result of `action`, which is called again after a pause when it raises.

    Raises:
        Exception: what the last attempt raised, unchanged.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except Exception as error:  # every store has its own family of errors
            if is_permanent(error):
                raise
            # Full jitter: ranks of a node that fail together do not retry at the same moment.
            time.sleep(_jitter.uniform(0, min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0**attempt)))
    return action()
