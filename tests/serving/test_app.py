"""The application: the detections of `load_detector`, refusals as JSON, and an OpenAPI that says so."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.serving import TOKEN, app_of, as_json, client_of, image_file, tiny_predictor

from pipeline.config.serving import ServingConfig
from pipeline.inference.predictor import Predictor
from pipeline.serving.app import build_app
from pipeline.serving.guard import token_digest

FORM = "multipart/form-data; boundary=x"


def part(name: str, value: str, end: str = "\r\n--x--") -> bytes:
    """A form with one field, and its end."""
    return f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}{end}'.encode()


SMALL = ServingConfig(max_bytes=20_000, max_pixels=20_000, timeout_s=5)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return tiny_predictor(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[TestClient]:
    with client_of(app_of(predictor, SMALL)) as client:
        yield client


def refused(answer: Any, status: int, code: str) -> str:
    """The sentence of a refusal."""
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json().keys() == {"code", "message"}
    message: str = answer.json()["message"]
    return message


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_predict_as_json_and_as_form_equals_the_predictor(client: TestClient, predictor: Predictor, kind: str) -> None:
    image = image_file((60, 45), kind)
    expected = {"width": 60, "height": 45, **predictor(image, threshold=0, top_k=7).to_dict()}
    assert len(expected["scores"]) == 7
    as_form = {"threshold": "0", "top_k": "7", "exif": "apply"}
    answers = [
        client.post("/v1/predict", json=as_json(image, threshold=0, top_k=7)),
        client.post("/v1/predict", data=as_form, files={"image": ("street.jpg", image)}),
    ]
    assert [answer.json() for answer in answers] == [expected] * 2


def test_predict_without_options_takes_the_defaults_of_the_predictor(client: TestClient, predictor: Predictor) -> None:
    image = image_file((60, 45))
    answer = client.post("/v1/predict", files={"image": image}).json()
    assert answer == {"width": 60, "height": 45, **predictor(image).to_dict()}


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "bad_json"),
        (b"[" * 10_000, "application/json", 400, "bad_json"),
        (b"\xff\xfe", "application/json", 400, "bad_json"),
        (b"[]", "application/json", 422, "invalid_field"),
        (b'{"image": ""}', "application/json", 422, "invalid_field"),
        (b'{"image": 3}', "application/json", 422, "invalid_field"),
        (b'{"image": "YWJj", "other": 1}', "application/json", 422, "invalid_field"),
        (b'{"image": "YWJj", "threshold": 2}', "application/json", 422, "invalid_field"),
        (b'{"image": "YWJj", "threshold": NaN}', "application/json", 422, "invalid_field"),
        (b'{"image": "YWJj", "threshold": true}', "application/json", 422, "invalid_field"),
        (b'{"image": "YWJj", "top_k": 0}', "application/json", 422, "invalid_field"),
        (b'{"image": "YWJj", "exif": "turn"}', "application/json", 422, "invalid_field"),
        (b'{"image": "not base64!"}', "application/json", 422, "not_base64"),
        (b'{"image": "YWJj"}', "application/json", 422, "not_an_image"),
        (b"image", "text/plain", 415, "unsupported_media_type"),
        (b"image", "", 415, "unsupported_media_type"),
        (b"image", "multipart/form-data", 400, "bad_form"),
        (b"image", FORM, 400, "bad_form"),
        (part("image", "abc", end=""), FORM, 400, "bad_form"),
        (part("image", "abc"), FORM, 422, "not_an_image"),
        (part("top_k", "1"), FORM, 422, "invalid_field"),
        (part("file", "1"), FORM, 422, "invalid_field"),
        (part("image", "a", end="\r\n" + part("image", "b").decode()), FORM, 422, "invalid_field"),
        (b"--x\r\n\r\n1\r\n--x--", FORM, 400, "bad_form"),
    ],
)  # fmt: skip
def test_predict_other_bodies_are_refused(client: TestClient, body: bytes, kind: str, status: int, code: str) -> None:
    refused(client.post("/v1/predict", content=body, headers={"content-type": kind}), status, code)


def test_predict_damaged_and_large_images_are_refused(client: TestClient) -> None:
    whole = image_file((60, 45))
    for image in (whole[: len(whole) // 2], whole[:30], b"\x89PNG\r\n\x1a\n" + bytes(100)):
        refused(client.post("/v1/predict", json=as_json(image)), 422, "broken_image")
    refused(client.post("/v1/predict", json=as_json(image_file((300, 100))[:9000])), 413, "too_many_pixels")
    assert "20,000" in refused(client.post("/v1/predict", content=bytes(20_001)), 413, "too_large")


def test_other_addresses_and_methods_are_refused_as_json(client: TestClient) -> None:
    refused(client.get("/absent"), 404, "not_found")
    answer = client.get("/v1/predict")
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_probes_model_and_page(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    model = client.get("/v1/model").json()
    assert (model["model"], model["max_bytes"]) == ("models:/tiny/1", 20_000)
    assert model["categories"]["10"] == "disc"
    assert "script-src 'sha256-" in client.get("/").headers["content-security-policy"]


def test_token_is_needed_for_the_model_and_not_for_probes(predictor: Predictor) -> None:
    with client_of(app_of(predictor, token_sha256=token_digest(TOKEN))) as client:
        for path in ("/v1/model", "/openapi.json", "/absent"):
            refused(client.get(path), 401, "unauthorized")
        for given in (f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer", ""):
            refused(client.get("/v1/model", headers={"Authorization": given}), 401, "unauthorized")
        assert client.get("/v1/model", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert [client.get(path).status_code for path in ("/", "/healthz", "/readyz")] == [200] * 3


def test_ready_says_no_while_the_model_is_stuck(predictor: Predictor) -> None:
    with client_of(app_of(predictor, ready=lambda: False)) as client:
        refused(client.get("/readyz"), 503, "unavailable")
        assert client.get("/healthz").status_code == 200


def test_slow_model_and_too_many_requests_are_refused(predictor: Predictor) -> None:
    """The limit of time is an answer, and so is the limit of requests while another one is computed."""
    began = threading.Event()

    async def detect(*_: Any) -> Any:
        began.set()
        await asyncio.sleep(60)

    settings = ServingConfig(timeout_s=1.5)
    app = build_app(predictor, detect, settings, model="slow", max_in_flight=1)
    answers: list[Any] = []
    with client_of(app) as client:

        def send() -> None:
            answers.append(client.post("/v1/predict", json=as_json(image_file((8, 8)))))

        first = threading.Thread(target=send)
        first.start()
        assert began.wait(10)
        second = client.get("/v1/model")
        refused(second, 429, "busy")
        assert second.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200
        first.join()
        refused(answers[0], 503, "timed_out")
        assert client.get("/v1/model").status_code == 200  # the slot is free again


def test_fault_of_the_model_is_an_answer_without_its_text(predictor: Predictor) -> None:
    async def detect(*_: Any) -> Any:
        raise RuntimeError("CUDA error in /secret/path.py")

    with client_of(build_app(predictor, detect, ServingConfig(), model="faulty")) as client:
        message = refused(client.post("/v1/predict", json=as_json(image_file((8, 8)))), 500, "internal")
    assert "secret" not in message


def test_openapi_names_both_forms_and_every_error(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]
    content = operation["requestBody"]["content"]
    assert content["application/json"]["schema"]["required"] == ["image"]
    assert content["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
    assert operation["responses"].keys() >= {"200", "400", "401", "408", "413", "415", "422", "429", "500", "503"}
