"""Clients that send a byte now and then, at a server of this process: they hold no place that others need."""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx2
import pytest
from support.serving import app_of, as_json, image_file, listening, tiny_predictor
from support.waiting import wait_until

from pipeline.config.serving import ServingConfig
from pipeline.inference.predictor import Predictor
from pipeline.serving import guard

UPLOADS = 4
IMAGE = image_file((8, 8))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return tiny_predictor(tmp_path_factory.mktemp("slow"))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No body is slow until a test says so."""
    monkeypatch.setattr(guard, "FAIR_SECONDS", 3600.0)


def settings(**changes: float) -> ServingConfig:
    """As many requests may wait as bodies may arrive."""
    return ServingConfig.model_validate({"max_uploads": UPLOADS, "max_waiting": UPLOADS, "timeout_s": 60, **changes})


@contextmanager
def slow_clients(address: str, count: int, first: bytes = b"{") -> Iterator[list[socket.socket]]:
    """Clients that promise a body of 1000 bytes and send its first ones."""
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    place = urlsplit(address)
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection((place.hostname, place.port), 30))
            client.sendall(head + first)
            clients.append(client)
        yield clients


def drip(clients: Sequence[socket.socket], seconds: float) -> None:
    """Each client sends a byte every 0.1 s."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for client in clients:
            client.sendall(b" ")
        time.sleep(0.1)


def test_slow_clients_more_than_may_wait_keep_nobody_out(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no place of those that wait for the model, and one gives way to each body that comes."""
    count = UPLOADS + settings().max_in_flight
    with listening(app_of(predictor, settings())) as address, slow_clients(address, count) as clients:
        wait_until(lambda: sum(map(_has_answer, clients)) == count - UPLOADS)
        monkeypatch.setattr(guard, "FAIR_SECONDS", 0.0)
        answers = [httpx2.post(f"{address}/v1/predict", json=as_json(IMAGE), timeout=30) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
        ended = [client.recv(10_000) for client in clients if _has_answer(client)]
        assert len(ended) == count - UPLOADS + 1  # the others had no place from the beginning
        (gave_way,) = [answer for answer in ended if not answer.startswith(b"HTTP/1.1 429")]
        assert gave_way.startswith(b"HTTP/1.1 408")
        assert b"took its place" in gave_way


def test_slow_client_that_goes_on_is_cut_off_before_the_time_is_over(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is closed as well, although it has not sent what it promised."""
    monkeypatch.setattr(guard, "UPLOAD_SHARE", 0.01)
    with (
        listening(app_of(predictor, settings())) as address,
        slow_clients(address, 1) as (client,),
        pytest.raises(OSError, match=r"pipe|reset"),
    ):
        drip([client], 30)


def test_uploads_that_are_not_slow_yet_keep_their_places(predictor: Predictor) -> None:
    with listening(app_of(predictor, settings())) as address, slow_clients(address, UPLOADS) as clients:
        drip(clients, 0.5)
        answer = httpx2.post(f"{address}/v1/predict", json=as_json(IMAGE), timeout=30)
        assert (answer.status_code, answer.json()["code"]) == (429, "busy")
        assert not any(_has_answer(client) for client in clients)


def test_uploads_that_are_fast_keep_their_places(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SLOW_RATE", 1)
    monkeypatch.setattr(guard, "FAIR_SECONDS", 0.0)
    with (
        listening(app_of(predictor, settings())) as address,
        slow_clients(address, UPLOADS, first=b"{" * 900) as clients,
    ):
        drip(clients, 0.5)
        answer = httpx2.post(f"{address}/v1/predict", json=as_json(IMAGE), timeout=30)
        assert (answer.status_code, answer.json()["code"]) == (429, "busy")
        assert not any(_has_answer(client) for client in clients)


def _has_answer(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        client.settimeout(30)
