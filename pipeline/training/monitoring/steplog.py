"""One JSON line per optimizer step in the run's folder: `steps/epoch_000.jsonl`, ... (rank 0 writes it).

A file holds one epoch and is always written whole, by rename. So it also works on stores that cannot append, and a
reader never sees half a line. It is written before every checkpoint, and every INTERVAL_SECONDS in between. Steps after
the last checkpoint of a killed run are trained, and written, again. Numbers that are not finite are null: JSON has no
number for them, and a column keeps its type. A file that cannot be written is a warning, once.
"""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

from pipeline.files.storage import exists, join, read_bytes, remove, remove_unfinished_files, write_bytes
from pipeline.logs import get_logger

FOLDER = "steps"
INTERVAL_SECONDS = 30.0  # between two writes if there is no checkpoint
MEDIAN_EPOCHS = 5  # so many files are read for the time of an epoch

log = get_logger("steplog")


class StepLog:
    """Records steps. The records of steps that a resumed run repeats are removed from the files.

    Args:
        folder: the run's, path or URL.
        epoch: the epoch at this start.
        step: optimizer steps that the whole run has done.
    """

    def __init__(self, folder: str, epoch: int, step: int) -> None:
        self._folder = join(folder, FOLDER)
        self._epoch = epoch
        self._lines: list[str] = []
        self._new = False  # whether there are lines that are not in the file
        self._time = time.monotonic()
        self._warned = False
        with self._warn_of_faults():
            self._load_existing(step)

    def add(self, epoch: int, step: int, values: Mapping[str, Any]) -> None:
        """Add the record of optimizer step `step`, counted from 1 over the whole run."""
        if epoch != self._epoch:
            self.flush()
            self._epoch, self._lines = epoch, []
        self._lines.append(_encode({"step": step, "epoch": epoch, **values}))
        self._new = True
        if time.monotonic() - self._time > INTERVAL_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the new lines, if there are any."""
        self._time = time.monotonic()
        if self._new:
            with self._warn_of_faults():
                write_bytes(self._path(self._epoch), "".join(f"{line}\n" for line in self._lines).encode())
                self._new = False

    def _load_existing(self, step: int) -> None:
        """Keep the lines of earlier starts up to `step`; remove those of later steps and epochs."""
        remove_unfinished_files(self._folder)
        if exists(path := self._path(self._epoch)):
            records = [json.loads(line) for line in read_bytes(path).decode().splitlines()]
            # Encoded again, because version 0.1 wrote NaN.
            self._lines = [_encode(record) for record in records if record["step"] <= step]
            self._new = bool(self._lines)
            self.flush()  # replaces the file by rename, so a process that is killed here loses no line
            if not self._lines:
                remove(path)
        later = self._epoch + 1
        while exists(path := self._path(later)):
            remove(path)
            later += 1

    def _path(self, epoch: int) -> str:
        return join(self._folder, f"epoch_{epoch:03d}.jsonl")

    @contextlib.contextmanager
    def _warn_of_faults(self) -> Any:
        try:
            yield
        except Exception as error:  # each store raises its own errors, and none of them may end the run
            if not self._warned:
                self._warned = True
                log.warning("%s cannot be written, training continues: %r", self._folder, error)


def _encode(record: Mapping[str, Any]) -> str:
    return json.dumps({key: _short(value) if isinstance(value, float) else value for key, value in record.items()})


def _short(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def read_epoch_seconds(folder: str, epochs: int) -> float | None:
    """The median time of an epoch's steps over the last whole epochs; None if there is none. Evaluation is left out.

    Args:
        folder: of the run, a path or URL.
        epochs: that were trained to their end.

    Raises:
        OSError: the store does not give them.
    """
    found: list[tuple[int, float]] = []  # steps and seconds
    for epoch in range(max(0, epochs - MEDIAN_EPOCHS), epochs):
        try:
            lines = read_bytes(join(folder, f"{FOLDER}/epoch_{epoch:03d}.jsonl")).decode().splitlines()
            found.append((len(lines), sum(json.loads(line)["seconds"] or 0.0 for line in lines)))
        except (FileNotFoundError, ValueError, KeyError):  # not written, damaged, or of a version without times
            continue
    longest = max((steps for steps, _ in found), default=0)  # `train.max_steps` may end within an epoch
    return statistics.median(seconds for steps, seconds in found if steps == longest) if longest else None
