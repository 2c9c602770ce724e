"""Requests that nobody should send: each has an answer, which is JSON and tells nothing of the server."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from support.hostile_bodies import Body, draw_bodies
from support.serving import app_of, as_json, client_of, image_file, tiny_predictor

from pipeline.config.serving import ServingConfig

LEAKS = re.compile(
    r"Traceback|File \\?\"|\.py\b|/(?:home|root|tmp|usr|work|opt)/|object at 0x|site-packages", re.IGNORECASE
)
LIMITS = ServingConfig(max_bytes=4 * 2**20, max_pixels=4_000_000)
Post = Callable[[Body], Any]  # the answer


def check(post: Post, bodies: Iterable[Body]) -> Counter[str]:
    """Send bodies and check the answers; how often each code came."""
    codes: Counter[str] = Counter()
    for number, body in enumerate(bodies):
        answer = post(body)
        told = f"body {number} ({body.what}, {body.kind!r}): {answer.status_code} {answer.text[:300]}"
        content = json.loads(answer.text)
        if answer.status_code == 200:
            codes["200"] += 1
            continue
        assert 400 <= answer.status_code < 500, told
        assert content.keys() == {"code", "message"}, told
        assert not LEAKS.search(answer.text), told
        assert len(answer.text) < 300, told
        codes[content["code"]] += 1
    return codes


def test_hostile_bodies_are_answered_as_json(tmp_path: Path) -> None:
    with client_of(app_of(tiny_predictor(tmp_path), LIMITS)) as client:

        def post(body: Body) -> Any:
            return client.post(
                "/v1/predict", content=body.content, headers={"content-type": body.kind.encode("latin-1")}
            )

        codes = check(post, draw_bodies(160))
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
