"""When a run ends before its last step, by its settings `train.patience` and `train.max_minutes`.

Patience is a function of the evaluations so far, which `evaluations.json` holds, so a resumed run ends where the same
run without a stop would have ended. The time of all starts is in the run's `clock.json`, written about once a minute by
rank 0. A clock that cannot be read or written is a warning: the time then counts from this start.
"""

import json
import time
from collections.abc import Callable

from pipeline.files.storage import join, read_bytes, write_bytes
from pipeline.logs import get_logger
from pipeline.runs.evaluations import History

FILE = "clock.json"
VERSION = 1
SAVE_SECONDS = 60.0  # between two writes: so much is lost when the process is killed

log = get_logger("ending")


def is_out_of_patience(history: History, patience: int | None) -> bool:
    """Whether none of the last `patience` evaluations has a higher AP than the best one before them."""
    if patience is None or len(history) <= patience:
        return False
    scores = [entry["AP"] for entry in history]
    return max(scores[-patience:]) <= max(scores[:-patience])


def describe_patience(history: History, patience: int) -> str:
    """One line for the terminal."""
    best = max(history, key=lambda entry: entry["AP"])
    return (
        f"training ends: the last {patience} evaluations have no higher AP than {best['AP']:.4f} of epoch "
        f"{best['epoch'] + 1:.0f} (train.patience={patience})"
    )


def describe_time(minutes: float) -> str:
    """One line for the terminal."""
    return f"training ends: all starts together took {minutes:g} minutes (train.max_minutes={minutes:g})"


class Clock:
    """The time that the workers of a run have been up, over all starts.

    Args:
        folder: of the run, path or URL.
        minutes: `train.max_minutes`; with None there is no file and no end.
        now: seconds of a clock that only goes forward.
    """

    def __init__(self, folder: str, minutes: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._path = join(folder, FILE)
        self._limit = None if minutes is None else 60 * minutes
        self._now = now
        self._start = self._saved = now()
        self._before = 0.0 if minutes is None else _read(self._path)

    def reset(self) -> None:
        """Begin at zero: a new run may have the name of one that failed before its first checkpoint."""
        self._before, self._start = 0.0, self._now()
        self.save()

    @property
    def seconds(self) -> float:
        """Of all starts."""
        return self._before + self._now() - self._start

    def is_over(self) -> bool:
        """Whether the time is up; writes the file if that is due."""
        if self._limit is None:
            return False
        if self._now() - self._saved >= SAVE_SECONDS:
            self.save()
        return self.seconds >= self._limit

    def save(self) -> None:
        """Write the file, if there is a limit."""
        if self._limit is None:
            return
        self._saved = self._now()
        try:
            write_bytes(self._path, json.dumps({"version": VERSION, "seconds": round(self.seconds, 1)}).encode())
        except Exception as error:  # each store raises its own errors
            log.warning("%s is not written: %s", self._path, str(error).strip() or repr(error))


def _read(path: str) -> float:
    try:
        document = json.loads(read_bytes(path))
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']} instead of {VERSION}")
        return float(document["seconds"])
    except FileNotFoundError:
        return 0.0
    except Exception as error:  # damaged, or a store that does not answer
        log.warning("%s cannot be read (%s), so train.max_minutes counts from this start", path, error)
        return 0.0
