"""Requests that nobody should send: each has an answer, which is JSON and tells nothing of the server."""

from pathlib import Path
from typing import Any

from support.hostile_bodies import Body, check_answers, draw_bodies
from support.schema_requests import check_openapi
from support.serving import app_of, as_json, client_of, image_file, listening, tiny_predictor

from pipeline.config.serving import ServingConfig

LIMITS = ServingConfig(max_bytes=4 * 2**20, max_pixels=4_000_000)


def test_hostile_bodies_are_answered_as_json(tmp_path: Path) -> None:
    with client_of(app_of(tiny_predictor(tmp_path), LIMITS)) as client:

        def post(body: Body) -> Any:
            return client.post(
                "/v1/predict", content=body.content, headers={"content-type": body.kind.encode("latin-1")}
            )

        codes = check_answers(post, draw_bodies(160))
        assert client.post("/v1/predict", json=as_json(image_file())).status_code == 200
    assert codes.keys() >= {
        "200",
        "bad_json",
        "bad_form",
        "invalid_field",
        "not_an_image",
        "broken_image",
        "too_many_pixels",
    }
    assert codes.keys() >= {"unsupported_media_type", "not_base64"}


def test_requests_drawn_from_openapi_get_the_answers_that_it_names(tmp_path: Path) -> None:
    with listening(app_of(tiny_predictor(tmp_path), LIMITS)) as address:
        statuses = check_openapi(address, examples=40)
    assert {path for path, _ in statuses} == {"/v1/predict", "/v1/model", "/healthz", "/readyz"}
    assert {status for _, status in statuses} <= {200, 400, 413, 415, 422}
    assert statuses["/v1/predict", 422] > 10
