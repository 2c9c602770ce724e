"""Metrics and files of a run into MLflow, from a thread: MLflow can neither stop nor slow training.

Rank 0 of `worker.py` writes through a `RunLogger`, and so does an evaluation task (`training/scoring.py`): one at a
time, and no key that rank 0 has.
"""

import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.mlflow_client import THREAD, connect, load_mlflow, text_of
from pipeline.runtime import get_logger

FLUSH_SECONDS = 10.0  # a worker's wait for its last records
QUEUE_RECORDS = 10_000  # kept while the server is away
BATCH_METRICS = 1000  # MLflow's limit for one request

logger = get_logger("tracking")


@dataclass(frozen=True)
class _Metrics:
    values: dict[str, float]
    step: int
    timestamp: int  # ms


class RunLogger:
    """Writes metrics and files into an existing run from a thread, so that MLflow can neither stop nor slow training.

    A metric at a step that the run already holds (after a restart from a checkpoint) is dropped, so no step is logged
    twice. Without a run id every call does nothing. Used by rank 0 of `worker.py`; close it, or use it with `with`.
    """

    def __init__(self, uri: str, run_id: str | None) -> None:
        self._run_id = run_id
        self._queue: queue.Queue[_Metrics | threading.Event | Callable[[Any], None] | None] = queue.Queue(QUEUE_RECORDS)
        self._given, self._written = 0, 0
        self._stuck = False  # the thread did not get through its queue when last waited for
        self._warned = False
        self._open = run_id is not None
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
            copy = _spooled(Path(path))
            self._put(lambda client: _upload(client, self._run_id, copy, folder))
        except Exception as error:
            self._warn(error)

    def text(self, text: str, file: str) -> None:
        """Write `text` as the artifact `file`."""
        self._put(lambda client: client.log_text(self._run_id, text, file))

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
        if self._given > self._written:
            lost = self._given - self._written
            logger.warning("%d of %d records of MLflow run %s were not written", lost, self._given, self._run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _put(self, record: _Metrics | Callable[[Any], None]) -> None:
        if self._open:
            self._given += 1
            self._enqueue(record)

    def _enqueue(self, record: _Metrics | threading.Event | Callable[[Any], None] | None) -> bool:
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
                        sink.write(batch)
                    else:
                        first(sink.client)
                    self._written += len(batch)
                    self._stuck = False
                except Exception as error:
                    self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("MLflow run %s cannot be written, training goes on: %s", self._run_id, text_of(error))


class _Sink:
    """The run as the logger's thread sees it: a client, and the last step the run holds of each metric."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self._run_id = client, run_id
        self._last = {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}

    def write(self, batch: list[Any]) -> None:
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


def _spooled(path: Path) -> Path:
    """A copy in a temporary folder of its own, which `_upload` removes."""
    spool = Path(tempfile.mkdtemp(prefix="mlflow_"))
    try:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        return Path(copy(path, spool / path.name))
    except OSError:
        shutil.rmtree(spool, ignore_errors=True)
        raise


def _upload(client: Any, run_id: str | None, copy: Path, folder: str) -> None:
    try:
        send = client.log_artifacts if copy.is_dir() else client.log_artifact
        send(run_id, str(copy), folder or None)
    finally:
        shutil.rmtree(copy.parent, ignore_errors=True)
