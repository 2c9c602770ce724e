"""Metrics and files of a run into MLflow, from a thread: MLflow can neither stop nor slow training.

Rank 0 of a training run writes through a `RunLogger`, and so does an evaluation task: one at a time, and no key that
rank 0 has.
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
from typing import Self

from pipeline.files.scratch import Scratch
from pipeline.logs import get_logger
from pipeline.tracking.api import TrackingClient
from pipeline.tracking.client import THREAD, connect, load_mlflow, text_of

FLUSH_SECONDS = 10.0  # a worker's wait for its last records
QUEUE_RECORDS = 10_000  # kept while the server is away
BATCH_METRICS = 1000  # MLflow's limit for one request
SPOOL_BYTES = 2 * 2**30  # of copied files that wait for a server: the temporary folder holds checkpoints too

logger = get_logger("tracking")


@dataclass(frozen=True)
class _Metrics:
    values: dict[str, float]
    step: int
    timestamp: int  # ms


@dataclass(frozen=True)
class _File:
    """A copy of a file or folder, which lies in a folder of its own; `folder` is the artifact's."""

    copy: Path
    folder: str


_Record = _Metrics | _File | Callable[[TrackingClient], None]


class RunLogger:
    """Writes metrics and files into an existing run from a thread, so that MLflow can neither stop nor slow training.

    A metric at a step that the run already holds (after a restart from a checkpoint) is dropped, so no step is logged
    twice. Without a run id every call does nothing. Close it, or use it with `with`.
    """

    def __init__(self, uri: str, run_id: str | None) -> None:
        self._run_id = run_id
        self._queue: queue.Queue[_Record | threading.Event | None] = queue.Queue(QUEUE_RECORDS)
        self._given, self._written = 0, 0
        self._stuck = False  # the thread did not get through its queue when last waited for
        self._warned = False
        self._open = run_id is not None
        self._spool: Scratch | None = None
        self._spooled: dict[Path, int] = {}  # bytes of each copy in it
        if self._open:
            load_mlflow()  # not in the thread: imports that run beside others can meet half-made modules
            threading.Thread(target=self._work, args=(uri, run_id), name=THREAD, daemon=True).start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of one optimizer step; returns at once."""
        try:
            self._put(_Metrics({key: float(value) for key, value in values.items()}, step, int(time.time() * 1000)))
        except Exception as error:  # a value that is no number is no reason to stop either
            self._warn(error)

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Copy a local file or folder into the run's `folder`; it is read at once and may vanish after the call."""
        if not self._open:
            return
        try:
            self._put(_File(self._copied(Path(path)), folder))
        except Exception as error:
            self._warn(error)

    def text(self, text: str, file: str) -> None:
        """Write `text` as the artifact `file`."""
        if self._run_id is not None:
            self._put(partial(_write_text, self._run_id, text, file))

    def flush(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Wait until all is written, at most `seconds`, and not at all while MLflow is known to hang.

        Call it before a checkpoint is reported: a worker that is killed later then leaves no gap in the curves.

        Returns:
            Whether all that was ever given is written.
        """
        if self._open and not self._stuck:
            done = threading.Event()
            self._stuck = not (self._enqueue(done) and done.wait(seconds))
            if self._stuck:
                self._warn(TimeoutError(f"no answer within {seconds:g} s"))
        return self._written == self._given

    def close(self) -> None:
        """Flush, and say how much was lost, if anything was."""
        if not self._open:
            return
        self.flush()
        self._open = False
        self._enqueue(None)
        if self._spool is not None:
            self._spool.close()  # also of what the thread did not come to
        if self._given > self._written:
            lost = self._given - self._written
            logger.warning("%d of %d records of MLflow run %s were not written", lost, self._given, self._run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _copied(self, path: Path) -> Path:
        files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        size = sum(each.stat().st_size for each in files)
        if sum(list(self._spooled.values())) + size > SPOOL_BYTES:
            raise OSError(f"{SPOOL_BYTES / 2**30:g} GiB of files wait for the server already")
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

    def _enqueue(self, record: _Record | threading.Event | None) -> bool:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            return False
        return True

    def _work(self, uri: str, run_id: str) -> None:
        sink: _Sink | None = None
        while True:
            records = [self._queue.get()]
            while not self._queue.empty():
                records.append(self._queue.get())
            # neighbouring metrics share a request, everything else goes alone
            for _, group in groupby(records, lambda record: _Metrics if isinstance(record, _Metrics) else id(record)):
                batch = list(group)
                first = batch[0]
                if first is None:
                    return
                if isinstance(first, threading.Event):
                    first.set()
                    continue
                try:
                    sink = sink or _Sink(connect(uri), run_id)
                    if isinstance(first, _Metrics):
                        sink.write([record for record in batch if isinstance(record, _Metrics)])
                    elif isinstance(first, _File):
                        sink.upload(first)
                    else:
                        first(sink.client)
                    self._written += len(batch)
                    self._stuck = False
                except Exception as error:
                    self._warn(error)
                finally:
                    if isinstance(first, _File):
                        self._remove(first.copy)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("MLflow run %s cannot be written, training goes on: %s", self._run_id, text_of(error))


def _write_text(run_id: str, text: str, file: str, client: TrackingClient) -> None:
    client.log_text(run_id, text, file)


class _Sink:
    """The run as the logger's thread sees it: a client, and the last step the run holds of each metric."""

    def __init__(self, client: TrackingClient, run_id: str) -> None:
        self.client, self._run_id = client, run_id
        self._last = {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}

    def write(self, batch: Sequence[_Metrics]) -> None:
        """Write metric records, without those the run already holds."""
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
        """Write a file or folder as an artifact."""
        send = self.client.log_artifacts if file.copy.is_dir() else self.client.log_artifact
        send(self._run_id, str(file.copy), file.folder or None)
