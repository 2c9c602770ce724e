"""The guard before Ray Serve's proxy, in the proxy's process, where bodies arrive and faults of replicas end.

Ray Serve calls `middlewares` if the variable HOOK names it when a node's Ray starts. The settings are in a variable
too, because the call has no arguments. Without the hook each replica still has its own guard; then a body waits in the
proxy at its full size, and an error of Ray Serve itself is plain text. Raises ValueError for settings that are not
valid.
"""

import os

from starlette.middleware import Middleware

from pipeline.config.serving import ServingConfig
from pipeline.serving.arguments import read_token
from pipeline.serving.guard import Guard

HOOK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
SETTINGS = "DDETR_SERVE_SETTINGS"
ATTEMPTS = 3  # a request is lost with its replica, and again if its successor dies


def environment(settings: ServingConfig) -> dict[str, str]:
    """The variables that give proxies their guard, and keep a line per request out of the terminal.

    They must be set before Ray starts.
    """
    return {
        HOOK: f"{__name__}.{middlewares.__name__}",
        SETTINGS: settings.model_dump_json(),
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }


def middlewares() -> list[Middleware]:
    """What Ray Serve puts before its proxy."""
    settings = ServingConfig.model_validate_json(os.environ.get(SETTINGS, "{}"))
    return [
        Middleware(
            Guard,
            max_bytes=settings.max_bytes,
            timeout_s=settings.timeout_s,
            max_in_flight=settings.max_in_flight,
            max_uploads=settings.max_uploads,
            token_sha256=read_token(),
            attempts=ATTEMPTS,
        )
    ]
