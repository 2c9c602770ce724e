"""Requests that schemathesis draws from a server's OpenAPI, valid and invalid ones, and its checks of the answers."""

from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance


def check_openapi(address: str, examples: int) -> Counter[tuple[str, int]]:
    """Send requests to every address; (path, status) of the answers. Raises what schemathesis finds.

    No schema can say that text is an image in base64, so valid requests may be refused. A form cannot hold an empty
    list, so an invalid form may arrive as a valid one.

    Args:
        address: of the server.
        examples: requests of each kind to each address that takes a body.
    """
    statuses: Counter[tuple[str, int]] = Counter()
    for found in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
        operation = found.ok()
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if operation.body else [GenerationMode.POSITIVE]
        for mode in modes:
            _send_all(operation, mode, examples, statuses)
    return statuses


def _send_all(operation: Any, mode: GenerationMode, examples: int, statuses: Counter[tuple[str, int]]) -> None:
    @given(operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def send(case: Any) -> None:
        answer = case.call()
        excluded = [positive_data_acceptance]
        if case.media_type == "multipart/form-data":
            excluded.append(negative_data_rejection)
        case.validate_response(answer, excluded_checks=excluded)
        statuses[operation.path, answer.status_code] += 1

    send()
