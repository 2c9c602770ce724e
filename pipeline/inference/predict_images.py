"""The detections of listed images, in this process or on the actors of a pool: the same bits for each image.

Images go through the model one by one, because a batch has the same results only to rounding. So neither the number of
workers nor the other images change a result; on a CPU the number of threads of a process does. An image that cannot be
read gives a row with the reason. A drawing that cannot be written is a StorageError.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from pipeline.checkpoint import Inference, TrainState, restore_weights
from pipeline.config import dump, from_dict
from pipeline.data.batch import Item
from pipeline.data.index import Category
from pipeline.errors import DetectionError, InputError, storage_error
from pipeline.evaluation.drawing import Exif, draw_detections, save_drawing
from pipeline.inference.evaluate import set_threads
from pipeline.inference.image_sources import ImageSource
from pipeline.inference.prediction_parts import Row
from pipeline.inference.predictor import Limits, Predictor, check_limits, read_image
from pipeline.model import build_model

READ_AHEAD = 4  # images that are decoded while the model works


@dataclass(frozen=True)
class ImageWork:
    """An image, and where its drawing goes, if anywhere."""

    source: ImageSource
    drawing: Path | None = None


@dataclass(frozen=True)
class PredictionOptions:
    """What is kept of each image's detections."""

    limits: Limits
    exif: Exif


def make_options(threshold: float, top_k: int, exif: Exif) -> PredictionOptions:
    """The options. Raises InputError if a limit is out of bounds."""
    check_limits(threshold, top_k, exif)
    return PredictionOptions(Limits(threshold, top_k), exif)


def read_source(source: ImageSource, exif: Exif) -> Image.Image:
    """The image as RGB. Raises InputError, with its name, if it cannot be read."""
    try:
        return read_image(source.read(), exif)
    except InputError as error:
        raise InputError(f"{source.name} {_reason(error)}") from None


@dataclass(frozen=True)
class BuildPrediction:
    """Makes the work of a process: the rows of images, by their numbers."""

    config: dict[str, Any]  # as `dump` gives it, with the scaling of this prediction
    categories: tuple[Category, ...]
    state: TrainState
    weights: dict[str, Tensor]
    images: tuple[ImageWork, ...]
    options: PredictionOptions

    @classmethod
    def of(cls, inference: Inference, images: tuple[ImageWork, ...], options: PredictionOptions) -> "BuildPrediction":
        """The work with a loaded checkpoint, whose config has the scaling of this prediction."""
        config, weights = dump(inference.config), inference.model.state_dict()
        return cls(config, inference.categories, inference.state, weights, images, options)

    def __call__(self) -> "PredictImages":
        """Build the model."""
        config = from_dict(self.config, "payload")
        device = "cuda" if config.scaling.use_gpu is True else "cpu"
        if device == "cpu":
            set_threads(config.scaling)
        model = build_model(config.model, load_backbone=False)
        restore_weights(model, self.weights)
        inference = Inference(config, self.categories, model.eval(), self.state)
        return PredictImages(Predictor(inference, device), self.images, self.options)


@dataclass(frozen=True)
class PredictImages:
    """The work of an actor; see `pool.Work`."""

    predictor: Predictor
    images: tuple[ImageWork, ...]
    options: PredictionOptions

    def __call__(self, items: range) -> Iterator[Row]:
        """The rows of these images; the next ones are read and decoded meanwhile."""
        reader = ThreadPoolExecutor(1, "read images")
        try:
            left = iter(items)
            ahead: deque[tuple[int, Future[tuple[Image.Image, Item] | str]]] = deque()
            ahead.extend((item, reader.submit(self._read, item)) for item in islice(left, READ_AHEAD))
            while ahead:
                item, read = ahead.popleft()
                found = read.result()
                ahead.extend((item, reader.submit(self._read, item)) for item in islice(left, 1))
                yield {"fault": found} if isinstance(found, str) else self._detect(item, *found)
        finally:
            reader.shutdown(cancel_futures=True)

    def _read(self, item: int) -> tuple[Image.Image, Item] | str:
        """The image, and as the model takes it; or why it cannot be read."""
        try:
            image = read_image(self.images[item].source.read(), self.options.exif)
        except InputError as error:
            return _reason(error)
        return image, self.predictor.prepare(image)

    def _detect(self, item: int, image: Image.Image, prepared: Item) -> Row:
        work = self.images[item]
        try:
            found = self.predictor.detect_batch([prepared], [self.options.limits])[0]
        except DetectionError as error:
            raise DetectionError(f"{work.source.name}: {error}") from None
        prediction = found.to_dict()
        if work.drawing is not None:
            try:
                save_drawing(draw_detections(image, prediction), work.drawing)
            except OSError as error:
                raise storage_error(
                    f"cannot write {work.drawing}: {error.strerror}; choose another --draw", error
                ) from None
        return {"size": list(found.size), **prediction}


def _reason(error: InputError) -> str:
    """Why an image cannot be read, as it follows its name."""
    return str(error).removeprefix("the image ")
