"""A whole server: the detections of `load_detector`, hostile clients, a replica that is killed, Ctrl-C."""

import base64
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from support.helpers import tiny_checkpoint
from support.hostile_bodies import Body, check_answers, draw_bodies
from support.schema_requests import check_openapi
from support.serving import as_json, image_file

from benchmarks.serving_process import PROXY, REPLICA, ServerProcess, start_server
from pipeline import load_detector

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]
FLAGS = ("--replicas", "2", "--max-bytes", str(4 * 2**20), "--max-pixels", "4000000", "--cpus-per-replica", "0.5")
WARM_UP, BODIES, CLIENTS = 400, 2000, 4
GROWTH = 1.05  # of the memory after the warm-up


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[ServerProcess]:
    with start_server(checkpoint, checkpoint.parent / "log", *FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.address, timeout=60) as client:
        yield client


def test_server_gives_the_bits_of_load_detector(server: ServerProcess, client: httpx2.Client, checkpoint: Path) -> None:
    torch.set_num_threads(1)
    detector = load_detector(checkpoint, device="cpu")
    for seed in range(4):
        image = image_file((200, 100 + 30 * seed), "PNG" if seed % 2 else "JPEG", seed)
        expected = detector(image, threshold=0, top_k=20).to_dict()
        answer = client.post("/v1/predict", json=as_json(image, threshold=0, top_k=20)).json()
        assert {key: answer[key] for key in expected} == expected
    assert client.get("/-/healthz").status_code == 200
    assert "Traceback" not in server.log.read_text()


def memory(server: ServerProcess) -> int:
    """Bytes of the replicas and the proxy."""
    return sum(process.memory_info().rss for process in server.processes(REPLICA, PROXY))


def test_hostile_bodies_leave_answers_as_json_and_no_memory_behind(
    server: ServerProcess, client: httpx2.Client
) -> None:
    """The warm-up has the largest image that is allowed, and as many requests at a time as come later."""

    def post(body: Body) -> Any:
        headers = {"content-type": body.kind.encode("latin-1")}
        return client.post("/v1/predict", content=body.content, headers=headers)

    largest = base64.b64encode(image_file((1400, 1000), "PNG"))[: 4 * 10**6]
    before = [Body("large", "application/json", b'{"image": "' + largest + b'"}')] * 8
    pids = {process.pid for process in server.processes(REPLICA, PROXY)}
    check_answers(post, [*before, *draw_bodies(WARM_UP, seed=1)], CLIENTS)
    warm = memory(server)
    codes = check_answers(post, draw_bodies(BODIES, seed=2), CLIENTS)
    after = memory(server)
    print(f"memory {warm / 2**20:.0f} MiB after the warm-up, {after / 2**20:.0f} after {BODIES} bodies; {codes}")
    assert sum(codes.values()) == BODIES
    assert after <= GROWTH * warm
    assert {process.pid for process in server.processes(REPLICA, PROXY)} == pids  # none has died


def test_requests_drawn_from_openapi_get_the_answers_that_it_names(server: ServerProcess) -> None:
    statuses = check_openapi(server.address, examples=300)
    print(dict(statuses))
    assert {status for _, status in statuses} <= {200, 400, 413, 415, 422}


def test_replica_that_is_killed_is_replaced_and_no_client_notices(server: ServerProcess) -> None:
    statuses: list[int] = []
    stop = threading.Event()

    def send(number: int) -> None:
        body = as_json(image_file((64, 48), seed=number))
        with httpx2.Client(base_url=server.address, timeout=60) as own:
            while not stop.is_set():
                statuses.append(own.post("/v1/predict", json=body).status_code)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(3)
        before = server.processes(REPLICA)
        assert len(before) == 2
        before[0].kill()
        time.sleep(5)
        sent = len(statuses)
        deadline = time.monotonic() + 180
        while len(server.processes(REPLICA)) < 2:
            assert time.monotonic() < deadline, "the replica is not replaced"
            time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(statuses) > sent > 0  # the other one answered meanwhile
    assert set(statuses) == {200}


def test_ctrl_c_answers_requests_that_are_there_and_ends_every_process(server: ServerProcess) -> None:
    """A request gets its answer, 503 or no connection; the connection of none is cut while it is computed."""
    answers: list[int] = []
    cut: list[Exception] = []

    def send(number: int) -> None:
        body = as_json(image_file((1400, 1000), seed=number))
        while True:
            try:
                answers.append(httpx2.post(f"{server.address}/v1/predict", json=body, timeout=60).status_code)
            except httpx2.ConnectError:
                return
            except httpx2.TransportError as error:
                cut.append(error)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop() == 130
    for thread in threads:
        thread.join()
    assert answers.count(200) > 4
    assert set(answers) <= {200, 503}
    assert cut == []
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    log = server.log.read_text()
    assert log.rstrip().endswith("stopped")
    assert "Traceback" not in log
