"""Logging of metrics and files into MLflow from a thread, so that MLflow can neither stop nor slow training.

Rank 0 of a training run writes through a `RunLogger`. An evaluation task does too: one at a time, and only keys that
rank 0 does not write. A failure of MLflow is a warning, once. Records wait while a server is down, and are sent when it
answers again; those that it refuses are dropped.
"""

import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.files.scratch import Scratch
from pipeline.logs import get_logger
from pipeline.tracking.api import TrackingClient
from pipeline.tracking.client import PAUSE_SECONDS, THREAD, answers, connect, is_outage, load_mlflow, text_of

FLUSH_SECONDS = 10.0  # longest wait for records while training waits, too
REPORT_SECONDS = 120.0  # the same for a report, which nothing but the end of its command waits for
ATTEMPTS = 3  # of a record that a server does not take although it answers
QUEUE_RECORDS = 10_000  # kept while the server does not answer
BATCH_METRICS = 1000  # MLflow's limit for one request
SPOOL_BYTES = 2 * 2**30  # copies that wait for the server; limited, because the temporary folder also has checkpoints

logger = get_logger("tracking")


@dataclass(frozen=True)
class _Metrics:
    values: dict[str, float]
    step: int
    timestamp: int  # ms


@dataclass(frozen=True)
class _File:
    """A copy of a file or folder, in its own temporary folder; `folder` is the artifact's."""

    copy: Path
    folder: str


_Record = _Metrics | _File | Callable[[TrackingClient], None]


class RunLogger:
    """Writes metrics and files into an existing run from a thread, so that MLflow can neither stop nor slow training.

    A metric at a step that the run already has (after a restart from a checkpoint) is dropped, so no step is logged
    twice. Without a run id every call does nothing. Close it, or use it as a context manager.
    """

    def __init__(self, uri: str, run_id: str | None) -> None:
        self._uri, self._run_id = uri, run_id
        self._queue: queue.Queue[_Record | threading.Event | None] = queue.Queue(QUEUE_RECORDS)
        self._given, self._written = 0, 0
        self._stuck = False  # whether the last flush timed out
        self._warned = False
        self._open = run_id is not None
        self._ended = threading.Event()
        self._sink: _Sink | None = None
        self._spool: Scratch | None = None
        self._spooled: dict[Path, int] = {}  # bytes of each copy in the spool
        if self._open:
            load_mlflow()  # not in the thread, because concurrent imports can see partly initialised modules
            threading.Thread(target=self._work, args=(run_id,), name=THREAD, daemon=True).start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the numbers of one optimizer step; returns at once."""
        try:
            self._put(_Metrics({key: float(value) for key, value in values.items()}, step, int(time.time() * 1000)))
        except Exception as error:  # e.g. a value that is not a number; it must not end the run
            self._warn(error)

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Copy a local file or folder into the run's `folder`. It is read at once and may be removed after the call."""
        if not self._open:
            return
        try:
            self._put(_File(self._copy_file(Path(path)), folder))
        except Exception as error:
            self._warn(error)

    def text(self, text: str, file: str) -> None:
        """Log `text` as the artifact `file`."""
        if self._run_id is not None:
            self._put(partial(_write_text, self._run_id, text, file))

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything is written.

        Call it before a checkpoint is reported. Then a worker that is killed later leaves no gap in the curves.

        Args:
            seconds: longest wait. None is FLUSH_SECONDS, and no wait at all if the last flush timed out.

        Returns:
            Whether all records so far are written.
        """
        if self._open and not (self._stuck and seconds is None):
            seconds = FLUSH_SECONDS if seconds is None else seconds
            deadline, done = time.monotonic() + seconds, threading.Event()
            self._stuck = not (self._enqueue(done, seconds) and done.wait(max(0.0, deadline - time.monotonic())))
            if self._stuck:
                self._warn(TimeoutError(f"no answer within {seconds:g} s"))
        return self._written == self._given

    def close(self, seconds: float | None = None) -> None:
        """Flush, and warn if records were lost. `seconds` as in `flush`."""
        if not self._open:
            return
        self.flush(seconds)
        self._open = False
        self._ended.set()
        self._enqueue(None)
        if self._spool is not None:
            self._spool.close()  # also removes copies that were not sent
        if self._given > self._written:
            lost = self._given - self._written
            logger.warning("%d of %d records of MLflow run %s were not written", lost, self._given, self._run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _copy_file(self, path: Path) -> Path:
        files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        size = sum(each.stat().st_size for each in files)
        if sum(list(self._spooled.values())) + size > SPOOL_BYTES:
            raise OSError(f"{SPOOL_BYTES / 2**30:g} GiB of files already wait for the server")
        self._spool = self._spool or Scratch("mlflow")
        copy = self._spool.folder / uuid.uuid4().hex / path.name
        self._spooled[copy] = size
        try:
            copy.parent.mkdir()
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
        except OSError:
            self._remove(copy)
            raise
        return copy

    def _remove(self, copy: Path) -> None:
        shutil.rmtree(copy.parent, ignore_errors=True)
        self._spooled.pop(copy, None)

    def _put(self, record: _Record) -> None:
        if self._open:
            self._given += 1
            if not self._enqueue(record) and isinstance(record, _File):
                self._remove(record.copy)

    def _enqueue(self, record: _Record | threading.Event | None, seconds: float = 0.0) -> bool:
        try:
            self._queue.put(record, seconds > 0, seconds)
        except queue.Full:
            return False
        return True

    def _work(self, run_id: str) -> None:
        while True:
            records = [self._queue.get()]
            while not self._queue.empty():
                records.append(self._queue.get())
            # Consecutive metrics share a request; every other record is sent alone.
            for _, group in groupby(records, lambda record: _Metrics if isinstance(record, _Metrics) else id(record)):
                batch = list(group)
                first = batch[0]
                if first is None:
                    return
                if isinstance(first, threading.Event):
                    first.set()
                    continue
                if self._deliver(run_id, batch):
                    self._written += len(batch)
                    self._stuck = False
                if isinstance(first, _File):
                    self._remove(first.copy)

    def _deliver(self, run_id: str, batch: Sequence[Any]) -> bool:
        """Send metrics or another record, again and again while the server is down; whether it took them."""
        for _ in range(ATTEMPTS):
            try:
                self._send(run_id, batch)
                return True
            except Exception as error:
                self._warn(error)
                if not is_outage(error):
                    return False
            if self._ended.wait(PAUSE_SECONDS):
                return False
            while not answers(self._uri):  # a server that is down says nothing about the record
                if self._ended.wait(PAUSE_SECONDS):
                    return False
        return False

    def _send(self, run_id: str, batch: Sequence[Any]) -> None:
        sink = self._sink = self._sink or _Sink(connect(self._uri), run_id)
        first = batch[0]
        if isinstance(first, _Metrics):
            sink.write(batch)
        elif isinstance(first, _File):
            sink.upload(first)
        else:
            first(sink.client)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "MLflow run %s cannot be written, the work goes on without it: %s", self._run_id, text_of(error)
            )


def _write_text(run_id: str, text: str, file: str, client: TrackingClient) -> None:
    client.log_text(run_id, text, file)


class _Sink:
    """The run for the logger's thread: a client, and the last step of each metric in the run."""

    def __init__(self, client: TrackingClient, run_id: str) -> None:
        self.client, self._run_id = client, run_id
        self._last = {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}

    def write(self, batch: Sequence[_Metrics]) -> None:
        """Write metric records, without those that the run already has."""
        from mlflow.entities import Metric

        rows = [
            Metric(key, value, record.timestamp, record.step)
            for record in batch
            for key, value in record.values.items()
            if record.step > self._last.get(key, -1)
        ]
        for start in range(0, len(rows), BATCH_METRICS):
            self.client.log_batch(self._run_id, metrics=rows[start : start + BATCH_METRICS])
        self._last |= {row.key: row.step for row in rows}

    def upload(self, file: _File) -> None:
        """Send a file or folder as an artifact."""
        send = self.client.log_artifacts if file.copy.is_dir() else self.client.log_artifact
        send(self._run_id, str(file.copy), file.folder or None)
