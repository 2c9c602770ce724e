"""The application of one replica: addresses, OpenAPI, and the way of a request from its body to detections.

It knows nothing of Ray Serve: whoever builds it says how prepared images become detections, alone or in batches. Every
answer that is not the page is JSON; errors are those of `refusals`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from pipeline import __version__
from pipeline.config.serving import ServingConfig
from pipeline.data.batch import Item
from pipeline.data.index import Category
from pipeline.inference.detections import ImageDetections
from pipeline.inference.predictor import Limits
from pipeline.serving.guard import Guard
from pipeline.serving.page import PAGE_POLICY, page
from pipeline.serving.predict_request import FORM, JSON, Options, PredictJson, read_request
from pipeline.serving.refusals import RefusedError, of_status, unavailable

LIMITS = ("max_bytes", "max_pixels", "timeout_s")  # that clients can read
Detect = Callable[[Item, Limits], Awaitable[ImageDetections]]


class Detector(Protocol):
    """What is served; a `Predictor`."""

    categories: tuple[Category, ...]

    def prepare(self, image: Any) -> Item:
        """See `Predictor.prepare`."""


class Answer(BaseModel):
    """The detections of an image, best first; the four lists have equal length."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    width: int
    """Pixels of the image, turned by its EXIF orientation if that is applied."""
    height: int
    boxes: list[list[float]] = Field(json_schema_extra={"items": {"minItems": 4, "maxItems": 4}})
    """[x, y, width, height] in pixels; a box may exceed the image."""
    scores: list[float]
    labels: list[str]
    category_ids: list[int]


class ErrorAnswer(BaseModel):
    """Why there are no detections: a code for programs, a sentence for people."""

    code: str
    message: str


class Served(BaseModel):
    """The model and its limits."""

    model: str
    categories: dict[int, str]
    max_bytes: int
    max_pixels: int
    timeout_s: float


def build_app(
    detector: Detector,
    detect: Detect,
    settings: ServingConfig,
    *,
    model: str,
    threads: int = 1,
    max_in_flight: int | None = None,
    token_sha256: str = "",
    ready: Callable[[], bool] = lambda: True,
) -> FastAPI:
    """The application of a replica.

    Args:
        detector: prepares images, in threads beside the one of the model.
        detect: from prepared images to detections.
        settings: limits.
        model: its name, for clients.
        threads: of those that decode and prepare; each holds one decoded image.
        max_in_flight: requests at a time; by default those of a server of this one replica.
        token_sha256: see `Guard`.
        ready: whether requests are answered.
    """
    app = FastAPI(
        title="Object detection",
        version=__version__,
        description=f"Detects objects by {model}.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    readers = ThreadPoolExecutor(threads, "reader")
    categories = {category.id: category.name for category in detector.categories}
    served = Served(model=model, categories=categories, **settings.model_dump(include={*LIMITS}))

    @app.post("/v1/predict", response_model=Answer, responses=_errors(400, 401, 408, 413, 415, 422, 429, 500, 503),
              openapi_extra={"requestBody": _bodies()})  # fmt: skip
    async def predict(request: Request) -> JSONResponse:
        """Detect objects in one image, sent as JSON (base64) or as a form."""
        kind, body = request.headers.get("content-type", ""), await request.body()
        read = asyncio.get_running_loop().run_in_executor(readers, read_request, kind, body, settings, detector.prepare)
        del body
        found = await detect(*await read)
        height, width = found.size
        return JSONResponse(
            {"width": width, "height": height, **found.to_dict()}, headers={"Cache-Control": "no-store"}
        )

    @app.get("/v1/model", response_model=Served, responses=_errors(401, 429, 503))
    async def describe() -> Served:
        """The model, its classes and the limits of a request."""
        return served

    @app.get("/healthz", responses=_errors(503))
    async def alive() -> dict[str, str]:
        """Whether the server lives; the guard answers."""
        return {"status": "alive"}

    @app.get("/readyz", responses=_errors(429, 503))
    async def is_ready() -> dict[str, str]:
        """Whether requests are answered now."""
        if not ready():
            raise unavailable()
        return {"status": "ready"}

    @app.get("/", include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(
            page(), headers={"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        )

    @app.exception_handler(RefusedError)
    async def refuse(_: Request, refusal: RefusedError) -> JSONResponse:
        return _as_json(refusal)

    @app.exception_handler(HTTPException)
    async def refuse_status(_: Request, error: HTTPException) -> JSONResponse:
        refusal = of_status(error.status_code)
        refusal.headers.update(error.headers or {})
        return _as_json(refusal)

    app.add_middleware(
        Guard,
        max_bytes=settings.max_bytes,
        timeout_s=settings.timeout_s,
        max_in_flight=settings.max_in_flight if max_in_flight is None else max_in_flight,
        max_uploads=settings.max_uploads,
        token_sha256=token_sha256,
    )
    return app


def _as_json(refusal: RefusedError) -> JSONResponse:
    return JSONResponse(refusal.content(), refusal.status, refusal.headers)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in statuses}


def _bodies() -> dict[str, Any]:
    """The two forms of a request, for OpenAPI."""
    file = {"type": "string", "format": "binary", "description": "A JPEG or PNG file."}
    form = Options.model_json_schema()
    form = {**form, "properties": {"image": file, **form["properties"]}, "required": ["image"], "title": "PredictForm"}
    return {
        "required": True,
        "content": {JSON: {"schema": PredictJson.model_json_schema()}, FORM: {"schema": form}},
    }
