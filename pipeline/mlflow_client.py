"""The connection to MLflow: which addresses are legal, whether anything answers there, how long a call may take.

Used by `tracking.py` and `registry.py`. MLflow's own client retries a dead server for minutes and makes a SQLite file
wherever it happens to run; here a missing answer is a TrackingError within seconds, an illegal address a ConfigError.
"""

import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError, TrackingError

PROBE_SECONDS = 5.0  # for a server to answer at all
CALL_SECONDS = 60.0  # for the few calls of one `bounded` block together (a new database takes 5-10 s)
THREAD = "mlflow"  # what the names of threads that talk to MLflow begin with
# A training job asks no telemetry server for anything, and its log holds no foreign progress bars and links.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

T = TypeVar("T")


def resolve_uri(uri: str) -> str:
    """Make a relative SQLite path absolute, so that workers in other folders open the same file.

    Raises:
        ConfigError: neither a database nor a server (MLflow no longer supports plain folders).
    """
    scheme, _, rest = uri.partition("://")
    if scheme == "sqlite":
        path = rest.removeprefix("/")
        if not rest.startswith("/") or not path:
            raise ConfigError(f"tracking.uri: '{uri}' names no file; write sqlite:///runs/mlflow.db")
        return f"sqlite:///{Path(path).absolute()}"
    if not rest or scheme.partition("+")[0] not in ("http", "https", "postgresql", "mysql", "mssql"):
        raise ConfigError(
            f"tracking.uri: '{uri}' is no MLflow address; write sqlite:///runs/mlflow.db or http://HOST:PORT"
        )
    return uri.rstrip("/")


def connect(uri: str, *, create: bool = False) -> Any:
    """A client of the tracking store and registry at `uri`, known to answer.

    Args:
        uri: as in `tracking.uri`.
        create: make a missing SQLite database instead of refusing it.

    Returns:
        An `mlflow.MlflowClient`.

    Raises:
        TrackingError: nothing answers there.
        ConfigError: see `resolve_uri`.
    """
    uri = resolve_uri(uri)
    database = sqlite_path(uri)
    if database is not None:
        if not (create or database.is_file()):
            raise TrackingError(
                f"there is no MLflow database {database} on this machine; train a run first, or give the address of an "
                "MLflow server (several machines need one: tracking.uri=http://HOST:PORT)"
            )
        database.parent.mkdir(parents=True, exist_ok=True)
    elif uri.startswith("http"):
        _probe(uri)
    return load_mlflow().MlflowClient(uri, uri)


def load_mlflow() -> Any:
    """Import MLflow, which takes seconds that ranks without a logger need not spend."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("urllib3.connectionpool").addFilter(_is_news)
    import mlflow

    return mlflow


def sqlite_path(uri: str) -> Path | None:
    """The file of a resolved SQLite address, None for any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def bounded(call: Callable[[], T], seconds: float = CALL_SECONDS) -> T:
    """Wait for `call` in a thread that is abandoned after `seconds`: MLflow has no limit of its own per call.

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
    """The first line of an error: MLflow's messages can hold whole SQL statements."""
    return next(iter(str(error).splitlines()), "") or repr(error)


def _is_news(record: logging.LogRecord) -> bool:
    """Drops urllib3's line per retry on this project's MLflow threads, which warn once themselves."""
    return not (record.threadName or "").startswith(THREAD)


def _probe(uri: str) -> None:
    """Ask the server's health page. Any HTTP answer will do: one behind a login refuses the page, yet is there."""
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(f"MLflow at {uri} does not answer ({reason}); start it or change tracking.uri") from None
