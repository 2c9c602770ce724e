"""The connection to MLflow: whether a store answers, how long a call may take, what its errors mean.

MLflow's own client retries a dead server or a damaged database for minutes. It creates a SQLite file in the current
folder, and migrates the tables of an older one. Here a missing answer is a TrackingError within seconds. A store that
answers but cannot be used as it is, is a TrackingInputError.
"""

import contextlib
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from pipeline.errors import InputError, PipelineError, TrackingError, TrackingInputError
from pipeline.files.credentials import redact
from pipeline.files.sqlite_uri import sqlite_file
from pipeline.tracking.api import TrackingClient
from pipeline.tracking.database import check_database
from pipeline.tracking.store import FLAG, RECORD, SETTING, TrackingStore, resolve_uri, with_login

PROBE_SECONDS = 5.0  # for a server to answer at all
CALL_SECONDS = 60.0  # for the few calls of one `call_within` together (a new database takes 5-10 s)
RESTART_SECONDS = 120.0  # longest wait for a server at the end of a run or an evaluation: it may be restarted
PAUSE_SECONDS = 2.0  # between two attempts to reach a server
THREAD = "mlflow"  # prefix of the names of threads that call MLflow
# No telemetry, and no progress bars or links of MLflow in the log of a training job.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

T = TypeVar("T")


def connect(store: TrackingStore | str, *, create: bool = False) -> TrackingClient:
    """A client of a tracking store and its registry, known to answer.

    Args:
        store: from `store.choose_store`, or an address as in `tracking.uri`.
        create: create a missing SQLite database instead of refusing it.

    Returns:
        An `mlflow.MlflowClient`.

    Raises:
        TrackingError: nothing answers there.
        TrackingInputError: a database that is damaged, not MLflow's, or of another version of MLflow.
        ConfigError: see `store.resolve_uri`.
    """
    store = store if isinstance(store, TrackingStore) else TrackingStore(resolve_uri(store))
    database = sqlite_file(store.uri)
    if database is not None:
        if not (create or database.exists()):
            raise TrackingInputError(
                f"there is no MLflow database {database} on this machine ({store.knob}); train a run first, or give "
                "the address of an MLflow server (several machines need one: tracking.uri=http://HOST:PORT)"
            )
        if store.knob == RECORD and not database.parent.is_dir():
            raise TrackingInputError(f"{RECORD} names {store.uri}, which does not exist here; give {FLAG} or {SETTING}")
        check_database(database, store.knob)
    elif store.uri.startswith("http"):
        _probe(store)
    mlflow, full = load_mlflow(), with_login(store.uri)

    def open_client() -> TrackingClient:
        client: TrackingClient = mlflow.MlflowClient(full, full)
        return client

    with mlflow_faults(store, "cannot be opened"):
        return call_within(open_client)


@contextlib.contextmanager
def mlflow_faults(store: TrackingStore, what: str) -> Iterator[None]:
    """Turn the errors of MLflow and its database into errors of this project, with one line of text.

    Args:
        store: for the message.
        what: the rest of "MLflow at ADDRESS ...", e.g. `did not register mine`.

    Raises:
        TrackingInputError: MLflow answered, and refused the request.
        TrackingError: any other fault.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if not _is_mlflows(error):
            raise
        kind = TrackingError if is_outage(error) else TrackingInputError
        raise kind(f"MLflow at {store.uri} ({store.knob}) {what}: {text_of(error)}{_advice(error)}") from error


def is_outage(error: Exception) -> bool:
    """Whether an error says that MLflow, its database or its server failed, so that a later attempt may succeed.

    It does not if MLflow answered and refused the request, a driver is missing, or other code failed.
    """
    if isinstance(error, PipelineError):
        return isinstance(error, TrackingError) and not isinstance(error, InputError)
    return _is_mlflows(error) and not isinstance(error, ImportError) and not 400 <= _status(error) < 500


def answers(store: TrackingStore | str) -> bool:
    """Whether a server answers at all; a database is taken to do so."""
    store = store if isinstance(store, TrackingStore) else TrackingStore(resolve_uri(store))
    try:
        if store.uri.startswith("http"):
            _probe(store)
    except TrackingError:
        return False
    return True


def await_answer(store: TrackingStore | str, seconds: float = RESTART_SECONDS) -> None:
    """Wait until a server answers, at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not answers(store) and time.monotonic() < deadline:
        time.sleep(PAUSE_SECONDS)


def leave_retries_to_logger() -> None:
    """Let MLflow's client give up within seconds in this process, because a `RunLogger` sends everything again.

    By itself it makes pauses that grow to two minutes, in which it does not notice that the server is back.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")


def load_mlflow() -> Any:
    """Import MLflow. It takes seconds, so only processes that need it import it."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("urllib3.connectionpool").addFilter(_keep_record)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs tracebacks of errors it also raises
    import mlflow

    return mlflow


def call_within(call: Callable[[], T], seconds: float = CALL_SECONDS) -> T:
    """Run `call` in a thread that is abandoned after `seconds`, because MLflow has no timeout per call.

    Raises:
        TrackingError: it took longer; anything that `call` raised.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=f"{THREAD}-call", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TrackingError(f"no answer within {seconds:g} s") from None


def text_of(error: Exception) -> str:
    """The first line of an error, without logins. MLflow's messages can contain SQL statements and addresses."""
    return redact(next(iter(str(error).splitlines()), "") or repr(error))


def _is_mlflows(error: Exception) -> bool:
    """Whether MLflow, its database or its HTTP client raised this; an ImportError means a missing driver."""
    origin = type(error).__module__.partition(".")[0]
    return isinstance(error, ImportError) or origin in ("mlflow", "sqlalchemy", "alembic", "sqlite3", "requests")


def _status(error: Exception) -> int:
    """The HTTP status of an error of MLflow; 500 for other errors."""
    return int(getattr(error, "get_http_status_code", lambda: 500)())


def _advice(error: Exception) -> str:
    if _status(error) not in (401, 403):
        return ""
    return "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


def _keep_record(record: logging.LogRecord) -> bool:
    """Drop urllib3's message per retry on this project's MLflow threads, which warn once themselves."""
    return not (record.threadName or "").startswith(THREAD)


def _probe(store: TrackingStore) -> None:
    """Request the server's health page. Any HTTP answer counts, because a server behind a login refuses the page."""
    try:
        urllib.request.urlopen(f"{store.uri}/health", timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(
            f"MLflow at {store.uri} does not answer ({reason}); start it or change {store.knob}"
        ) from None
