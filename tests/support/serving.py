"""The application of a replica without Ray Serve: its detector, images computed one by one, and a client."""

import base64
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from pipeline.checkpoint import load_inference
from pipeline.config.serving import ServingConfig
from pipeline.data.batch import Item
from pipeline.inference.detections import ImageDetections
from pipeline.inference.predictor import Limits, Predictor
from pipeline.serving.app import build_app
from support.helpers import tiny_checkpoint

TOKEN = "a-token-of-more-than-16-characters"


def tiny_predictor(folder: Path) -> Predictor:
    """A detector of random weights on the CPU."""
    return Predictor(load_inference(tiny_checkpoint(folder)), "cpu")


def app_of(predictor: Predictor, settings: ServingConfig | None = None, **options: Any) -> FastAPI:
    """An application that computes each image alone, in the event loop."""

    async def detect(item: Item, limits: Limits) -> ImageDetections:
        return predictor.detect_batch([item], [limits])[0]

    return build_app(predictor, detect, settings or ServingConfig(), model="models:/tiny/1", **options)


def client_of(app: Any) -> TestClient:
    """A client that gets faults of the application as answers, as clients do."""
    return TestClient(app, raise_server_exceptions=False)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The application behind a server of this process, on a free port of loopback; its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(100)  # clients may come before the server accepts
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def image_file(size: tuple[int, int] = (120, 90), kind: str = "JPEG", seed: int = 0) -> bytes:
    """An image file of noise, `size` = (width, height)."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def as_json(image: bytes, **options: Any) -> dict[str, Any]:
    """A request as JSON."""
    return {"image": base64.b64encode(image).decode(), **options}
