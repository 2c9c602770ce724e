"""Trying again where a store failed for a moment: exponential backoff with full jitter.

Used by `storage` for every remote call. What will fail the same way again (no such file, no permission, no reader for
the URL) is raised at once; anything else after ATTEMPTS, the cause unchanged.
"""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import PipelineError

T = TypeVar("T")

ATTEMPTS = 6
FIRST, LONGEST = 0.2, 10.0  # seconds: the upper bounds of the first and of any pause, about 12 in all on average
FOREVER = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, NotImplementedError),
    PipelineError,
)
_jitter = random.Random()  # apart from the global generator, which training may have seeded


def retrying(action: Callable[[], T]) -> T:
    """The result of `action`, called again after a pause while it fails. Its last exception is raised as it is."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except FOREVER:
            raise
        except Exception:  # each store has its own family of errors; what is no passing fault fails again below
            # Full jitter: the ranks of a node that failed together do not come back together.
            time.sleep(_jitter.uniform(0, min(LONGEST, FIRST * 2.0**attempt)))
    return action()
