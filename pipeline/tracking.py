"""MLflow from few processes: the driver creates or continues a run, rank 0 writes into it by run id.

An evaluation task (`training/scoring.py`) writes too, one at a time and no key that rank 0 has. Used by `driver.py`
(`start_run`, `finish_run`), `worker.py` (`RunLogger`) and `registry.py` (`connect`). Only `MlflowClient` is used, never
MLflow's process-wide active run. Training outlives MLflow: `start_run`, `finish_run` and `RunLogger` warn once and go
on, waiting seconds at most; `connect` raises TrackingError for commands that need it.
"""

import json
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

from pipeline.config import Config, TrackingConfig, flatten
from pipeline.errors import TrackingError
from pipeline.mlflow_client import THREAD, bounded, connect, load_mlflow, resolve_uri, sqlite_path, text_of
from pipeline.runtime import get_logger

FLUSH_SECONDS = 10.0  # a worker's wait for its last records
QUEUE_RECORDS = 10_000  # kept while the server is away
BATCH_METRICS, BATCH_PARAMS = 1000, 100  # MLflow's limits for one request
STATUS_TAG = "run_status"
PARENT_TAG = "mlflow.parentRunId"

logger = get_logger("tracking")


def start_run(
    tracking: TrackingConfig,
    config: Config,
    name: str,
    *,
    resume_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    parent_run_id: str | None = None,
) -> str | None:
    """Create the MLflow run of a training run, or open its old one again; called by the driver alone.

    A new run gets the flattened config as parameters, once. A continued one keeps its parameters, which MLflow does
    not let change; settings that differ now are written to its tag `resumed_with`.

    Returns:
        The run id, or None (and one warning) if MLflow does not answer.

    Raises:
        ConfigError: `tracking.uri` is not an MLflow address.
    """
    uri = resolve_uri(tracking.uri)
    params = as_params(flatten(config))

    def start() -> str:
        client = connect(uri, create=True)
        if resume_run_id is not None and _reopen(client, resume_run_id, params, tags or {}):
            return resume_run_id
        all_tags = {**(tags or {}), **({PARENT_TAG: parent_run_id} if parent_run_id else {})}
        run = client.create_run(_experiment(client, uri, tracking.experiment), tags=all_tags, run_name=name)
        _log_params(client, run.info.run_id, params)
        return str(run.info.run_id)

    try:
        return bounded(start)
    except Exception as error:
        logger.warning("MLflow at %s does not answer, training goes on without it: %s", uri, text_of(error))
        return None


def as_params(values: Mapping[str, Any]) -> dict[str, str]:
    """Flattened settings as MLflow's parameters: text as it is, everything else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def finish_run(uri: str, run_id: str | None, status: str) -> None:
    """Close a run as FINISHED, FAILED, KILLED or PREEMPTED; a failure is a warning. None closes nothing.

    MLflow has no word for a run that left and will go on: it is KILLED there, and the tag `run_status` says PREEMPTED.
    """
    if run_id is None:
        return

    def close() -> None:
        client = connect(uri)
        client.set_tag(run_id, STATUS_TAG, status)
        client.set_terminated(run_id, "KILLED" if status == "PREEMPTED" else status)

    try:
        bounded(close)
    except Exception as error:
        logger.warning("MLflow run %s could not be closed as %s: %s", run_id, status, text_of(error))


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


def _reopen(client: Any, run_id: str, params: dict[str, str], tags: Mapping[str, str]) -> bool:
    """Set an existing run to RUNNING; False (and a warning) if the store does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage != "active":
        logger.warning("MLflow run %s is gone; the resumed training gets a new one", run_id)
        return False
    known = run.data.params
    changed = {key: value for key, value in params.items() if known.get(key) != value}
    if not known:  # it broke before its parameters were written
        _log_params(client, run_id, params)
    elif changed:
        client.set_tag(run_id, "resumed_with", json.dumps(changed))
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    client.update_run(run_id, status="RUNNING")
    return True


def _experiment(client: Any, uri: str, name: str) -> str:
    """The experiment's id. On SQLite its files go beside the database, not into whatever folder is current."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_path(uri)
        location = (database.parent / "mlartifacts").as_uri() if database else None
        return str(client.create_experiment(name, artifact_location=location))
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name} is deleted; run `mlflow experiments restore` or change tracking.experiment"
        )
    return str(experiment.experiment_id)


def _log_params(client: Any, run_id: str, params: dict[str, str]) -> None:
    from mlflow.entities import Param

    rows = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(rows), BATCH_PARAMS):
        client.log_batch(run_id, params=rows[start : start + BATCH_PARAMS])
