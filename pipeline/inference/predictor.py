"""Prediction with a trained checkpoint: from images to named boxes.

An image is turned by its EXIF orientation, then resized and normalised as in evaluation. It goes through the model
alone and unpadded, so its result does not depend on other images. A source that is missing or not an image is an
InputError.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.checkpoint import Inference
from pipeline.data.batch import Item, collate
from pipeline.data.images import MAX_BYTES, decode, read_orientation, to_rgb, turn_upright
from pipeline.data.transforms import apply, evaluation_view
from pipeline.engine.cpu_tuning import tune_model
from pipeline.errors import InputError, ShardError
from pipeline.evaluation.drawing import THRESHOLD, TOP_K, Exif, Prediction
from pipeline.model.postprocess import postprocess, sort_by_score

Source = bytes | str | Path | Image.Image | NDArray[Any]


class Predictor:
    """A loaded checkpoint that predicts on images."""

    def __init__(self, inference: Inference, device: str | torch.device | None = None) -> None:
        self._config = inference.config
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = inference.model.to(self._device).eval()
        tune_model(self._model, inference.config.train, self._device)
        raw = inference.config.data.labels == "raw"
        self._category = {c.id if raw else k: c for k, c in enumerate(inference.categories)}  # by label

    @torch.no_grad()
    def predict(
        self, images: Iterable[Source], threshold: float = THRESHOLD, top_k: int = TOP_K, exif: Exif = "apply"
    ) -> list[Prediction]:
        """Detect objects, one image at a time.

        Args:
            images: see `read_image`.
            threshold: detections with a lower score are left out; 0 keeps those that evaluation scores.
            top_k: largest number of detections per image.
            exif: see `read_image`; boxes are in pixels of the image that it returns.

        Raises:
            InputError: a source is missing or not an image, or a limit is out of bounds.
        """
        if not 0 <= threshold <= 1 or top_k < 1:
            raise InputError(f"threshold {threshold} must lie in [0, 1] and top_k {top_k} must be at least 1")
        if exif not in get_args(Exif):
            raise InputError(f"exif {exif!r} must be one of {', '.join(get_args(Exif))}")
        return [self._one(read_image(source, exif), threshold, top_k) for source in images]

    def _one(self, image: Image.Image, threshold: float, top_k: int) -> Prediction:
        size = (image.height, image.width)
        no_boxes, no_labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        view = evaluation_view(size, self._config.data.augment)
        resized, _, _ = apply(image, no_boxes, no_labels, view)
        batch = collate([Item(resized, no_boxes, no_labels, 0, size)], 0, 1.0).to(self._device)
        outputs = self._model(batch.images, batch.mask)
        found = sort_by_score(postprocess(outputs, batch.sizes, top_k)[0])
        prediction = Prediction(boxes=[], scores=[], labels=[], category_ids=[])
        values = (found["scores"].tolist(), found["labels"].tolist(), found["boxes_xyxy"].tolist())
        for score, label, (left, top, right, bottom) in zip(*values, strict=True):
            category = self._category.get(label)  # the raw layout has labels without a category
            if category is None or score < threshold:
                continue
            prediction["boxes"].append([left, top, right - left, bottom - top])
            prediction["scores"].append(score)
            prediction["labels"].append(category.name)
            prediction["category_ids"].append(category.id)
        return prediction


def read_image(source: Source, exif: Exif = "apply") -> Image.Image:
    """The image as RGB, without its EXIF tag, so that it is not turned twice.

    Args:
        source: a path, encoded JPEG or PNG bytes, a Pillow image, or an array of integers 0 to 255, [h, w, 3] as RGB.
        exif: `apply` turns the image by its EXIF orientation, as viewers do; `ignore` keeps it as stored.

    Raises:
        InputError: the source is missing or not an image; the message names the path.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(_pixels(source))
    if isinstance(source, Image.Image):
        orientation = read_orientation(source) if exif == "apply" else 1
        try:
            return _turn(to_rgb(source), orientation)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow decodes a file when its pixels are needed
            raise InputError(f"the image does not decode: {error}") from None
    name, data = "the image", source
    if isinstance(data, str | Path):
        path = Path(data)
        name = str(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise InputError(f"{name} has more than {MAX_BYTES:,} bytes; scale it down")
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read image {name}: {error.strerror}") from None
    if not isinstance(data, bytes):
        raise InputError(f"{type(data).__name__} is not an image; give a path, bytes, a Pillow image or an array")
    try:
        return _turn(decode(data), read_orientation(data) if exif == "apply" else 1)
    except ShardError as error:
        raise InputError(f"{name} {error}") from None


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned and without EXIF; unchanged if it has no EXIF and is not to be turned."""
    turned = turn_upright(image, orientation)
    if "exif" in turned.info:
        turned = turned.copy()
        del turned.info["exif"]
    return turned


def _pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise InputError(f"an array of shape {list(array.shape)} is not an image; it must be [height, width, 3], RGB")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise InputError(f"an array of {array.dtype} is not an image; its values must be integers from 0 to 255")
    return array.astype(np.uint8)
