"""One JSON line per optimizer step in the run's folder: `steps/epoch_000.jsonl`, ... (rank 0 writes it).

A file holds an epoch and is written whole, by rename, so that a store that cannot append takes it too, and a reader
never sees half a line. It is written before every checkpoint and now and then between; what a killed run did after its
last checkpoint is done, and written, again. Numbers that are not finite are null: JSON has no word for them, and a
column keeps its type. A file that cannot be written is a warning, once.
"""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from pipeline.files.storage import exists, join, read_bytes, remove, remove_unfinished_files, write_bytes
from pipeline.logs import get_logger

FOLDER = "steps"
INTERVAL = 30.0  # seconds between two writes that no checkpoint asks for

log = get_logger("steplog")


class StepLog:
    """Takes a record per step; those of steps that a resumed run does again are dropped from the files.

    Args:
        folder: the run's, path or URL.
        epoch: the one that goes on.
        step: optimizer steps done by the whole run.
    """

    def __init__(self, folder: str, epoch: int, step: int) -> None:
        self._folder = join(folder, FOLDER)
        self._epoch = epoch
        self._lines: list[str] = []
        self._new = False  # there are lines that are not in the file
        self._time = time.monotonic()
        self._warned = False
        with self._warning():
            self._take_over(step)

    def add(self, epoch: int, step: int, values: Mapping[str, Any]) -> None:
        """The record of optimizer step `step`, counted from 1 over the whole run."""
        if epoch != self._epoch:
            self.flush()
            self._epoch, self._lines = epoch, []
        self._lines.append(_encode({"step": step, "epoch": epoch, **values}))
        self._new = True
        if time.monotonic() - self._time > INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Write what is new."""
        self._time = time.monotonic()
        if self._new:
            with self._warning():
                write_bytes(self._path(self._epoch), "".join(f"{line}\n" for line in self._lines).encode())
                self._new = False

    def _take_over(self, step: int) -> None:
        """Keep what earlier starts wrote of this epoch up to `step`, remove what they wrote of later ones."""
        remove_unfinished_files(self._folder)
        if exists(path := self._path(self._epoch)):
            records = [json.loads(line) for line in read_bytes(path).decode().splitlines()]
            self._lines = [_encode(record) for record in records if record["step"] <= step]  # 0.1 wrote NaN
            self._new = bool(self._lines)
            self.flush()  # replaces the file, so that a process killed here loses none of these lines
            if not self._lines:
                remove(path)
        later = self._epoch + 1
        while exists(path := self._path(later)):
            remove(path)
            later += 1

    def _path(self, epoch: int) -> str:
        return join(self._folder, f"epoch_{epoch:03d}.jsonl")

    @contextlib.contextmanager
    def _warning(self) -> Any:
        try:
            yield
        except Exception as error:  # each store has its own family of errors, and no metric is worth a run
            if not self._warned:
                self._warned = True
                log.warning("%s cannot be written, training goes on: %r", self._folder, error)


def _encode(record: Mapping[str, Any]) -> str:
    return json.dumps({key: _short(value) if isinstance(value, float) else value for key, value in record.items()})


def _short(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None
