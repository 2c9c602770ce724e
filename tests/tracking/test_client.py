"""Which errors are an outage, and the wait for a server that is being restarted."""

import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE, PERMISSION_DENIED
from support.s3 import free_port

from pipeline.errors import ConfigError, TrackingError, TrackingInputError
from pipeline.tracking import client as module
from pipeline.tracking.client import answers, await_answer, is_outage


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (TrackingError("does not answer"), True),
        (MlflowException("failed with exception: connection refused", INTERNAL_ERROR), True),
        (requests.ConnectionError("reset by peer"), True),
        (sqlite3.OperationalError("database is locked"), True),
        (TrackingInputError("there is no database"), False),
        (MlflowException("no such run", INVALID_PARAMETER_VALUE), False),
        (MlflowException("READ is not enough", PERMISSION_DENIED), False),
        (ConfigError("not an address"), False),
        (ImportError("no driver"), False),
        (TypeError("a fault of ours"), False),
    ],
)
def test_outage_is_what_a_later_attempt_may_not_meet(error: Exception, outage: bool) -> None:
    assert is_outage(error) is outage


def test_await_answer_ends_when_the_server_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.05)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    started: list[ThreadingHTTPServer] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)  # a server with logins

        def log_message(self, *_: Any) -> None:
            pass

    def start() -> None:
        started.append(ThreadingHTTPServer(("127.0.0.1", port), Handler))
        started[0].serve_forever()

    assert not answers(uri)
    timer = threading.Timer(0.5, start)
    timer.start()
    try:
        await_answer(uri, 60)
        assert started
        assert answers(uri)
    finally:
        timer.join(0.1)
        started[0].shutdown()
        started[0].server_close()
        timer.join()


def test_await_answer_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.05)
    began = time.monotonic()
    await_answer(f"http://127.0.0.1:{free_port()}", 0.3)
    assert 0.3 <= time.monotonic() - began < 10
    await_answer("sqlite:///mlflow.db", 60)  # nothing to wait for
    assert time.monotonic() - began < 10
