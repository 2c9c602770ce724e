"""The application in Ray Serve: replicas that each load the model and compute batches. Ray Serve imports this module.

`build` is the import path of a Serve config file; it takes the file's `args`. Raises what `load_detector` raises, and a
ConfigError for arguments that are not valid.
"""

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from ray import serve
from ray.serve.config import BackpressureConfig, RequestRouterConfig

from pipeline.data.batch import Item
from pipeline.engine.cpu_tuning import KEEP_FREED_MEMORY
from pipeline.inference.detections import ImageDetections
from pipeline.inference.predictor import Limits
from pipeline.registry.load import load_detector
from pipeline.serving.app import build_app
from pipeline.serving.arguments import Arguments, parse_arguments, public_name, read_token
from pipeline.serving.batching import Work, detect_all

STUCK = 10  # times `timeout_s` that one batch may take


class DetectorReplica:
    """One process with the model."""

    def __init__(self, arguments: str, token_sha256: str) -> None:
        """Load the model.

        Args:
            arguments: `Arguments` as JSON.
            token_sha256: see `Guard`.
        """
        self._arguments = Arguments.model_validate_json(arguments)
        self._token = token_sha256
        settings, gpu = self._arguments.settings, self._arguments.gpu
        self._threads = max(1, int(settings.cpus_per_replica))
        if not gpu:
            torch.set_num_threads(self._threads)
        self._detector = load_detector(
            self._arguments.model, device="cuda" if gpu else "cpu", tracking_uri=self._arguments.tracking_uri
        )
        self._largest = settings.resolved_batch_size(gpu)
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._busy_since: float | None = None
        self._detect_batch.set_max_batch_size(self._largest)
        self._detect_batch.set_batch_wait_timeout_s(settings.batch_wait_ms / 1e3 if self._largest > 1 else 0.0)

    def __serve_build_asgi_app__(self) -> Any:  # the name that Ray Serve looks for
        """The application; called once, after the model is loaded."""
        settings, gpu = self._arguments.settings, self._arguments.gpu
        return build_app(
            self._detector,
            self._detect,
            settings,
            model=public_name(self._arguments),
            threads=self._threads,
            max_in_flight=settings.per_replica(gpu) + settings.max_waiting,
            token_sha256=self._token,
            ready=lambda: not self._is_stuck(),
        )

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if self._is_stuck():
            raise RuntimeError("a batch does not end")

    async def _detect(self, item: Item, limits: Limits) -> ImageDetections:
        result: ImageDetections | Exception = await self._detect_batch((item, limits))
        if isinstance(result, Exception):
            raise result
        return result

    @serve.batch  # type: ignore[untyped-decorator]  # Ray has no types
    async def _detect_batch(self, work: list[Work]) -> list[ImageDetections | Exception]:
        self._busy_since = time.monotonic()
        try:
            loop, detect = asyncio.get_running_loop(), self._detector.detect_batch
            return await loop.run_in_executor(self._model_thread, detect_all, detect, work, self._largest)
        finally:
            self._busy_since = None

    def _is_stuck(self) -> bool:
        since = self._busy_since
        return since is not None and time.monotonic() - since > STUCK * self._arguments.settings.timeout_s


def build(arguments: Mapping[str, Any]) -> Any:
    """The application for Ray Serve.

    Args:
        arguments: fields of `Arguments`.

    Raises:
        ConfigError: an argument is not valid, or there is no token where one is needed.
    """
    checked = parse_arguments(arguments)
    token = read_token(checked.needs_token)
    settings = checked.settings
    options: dict[str, Any] = {"num_cpus": settings.cpus_per_replica, "num_gpus": 1 if checked.gpu else 0}
    if not checked.gpu:
        options["runtime_env"] = {"env_vars": KEEP_FREED_MEMORY}
    deployment: Any = serve.deployment(serve.ingress()(DetectorReplica))
    return deployment.options(
        name="Detector",
        num_replicas=settings.replicas,
        ray_actor_options=options,
        max_ongoing_requests=settings.per_replica(checked.gpu),
        max_queued_requests=settings.max_waiting,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        # Ray's default lets a request that finds no free place look again only every half second.
        request_router_config=RequestRouterConfig(initial_backoff_s=0.002, max_backoff_s=0.02),
        max_constructor_retry_count=3,
        graceful_shutdown_timeout_s=settings.timeout_s,
    ).bind(checked.model_dump_json(), token)
