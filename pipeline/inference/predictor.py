"""Prediction with a trained checkpoint: from images to named boxes.

An image is turned by its EXIF orientation, then resized and normalised as in evaluation. It goes through the model
alone and unpadded, so its result does not depend on other images. A source that is missing or not an image is an
InputError.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.checkpoint import Inference
from pipeline.data.batch import Item, Size, collate
from pipeline.data.images import MAX_BYTES, decode, read_orientation, to_rgb, turn_upright
from pipeline.data.transforms import apply, evaluation_view
from pipeline.engine.cpu_tuning import tune_model
from pipeline.errors import DetectionError, InputError, ShardError
from pipeline.evaluation.drawing import THRESHOLD, TOP_K, Exif, Prediction
from pipeline.inference.detections import ImageDetections
from pipeline.model.postprocess import postprocess, sort_by_score

Source = bytes | str | Path | Image.Image | NDArray[Any] | torch.Tensor
ONE_IMAGE = (bytes, str, Path, Image.Image, np.ndarray, torch.Tensor)  # the types of Source, most of them iterable
FORMS = "a path, bytes, a Pillow image, an array [height, width, 3] or a tensor [3, height, width]"
NO_BOXES, NO_LABELS = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


class Limits(NamedTuple):
    """Which detections of an image are kept: from this score on, and so many at most."""

    threshold: float
    top_k: int


class Predictor:
    """A loaded checkpoint that predicts on images.

    Attributes:
        categories: ids and names of the classes that it detects.
    """

    def __init__(self, inference: Inference, device: str | torch.device | None = None) -> None:
        self._config = inference.config
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = inference.model.to(self._device).eval()
        tune_model(self._model, inference.config.train, self._device)
        self.categories = inference.categories
        raw = inference.config.data.labels == "raw"
        self._category = {c.id if raw else k: c for k, c in enumerate(inference.categories)}  # by label

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a path is also an iterable of characters; it means one image
        self, images: Source, *, threshold: float = ..., top_k: int = ..., exif: Exif = ...
    ) -> ImageDetections: ...
    @overload
    def __call__(
        self, images: Iterable[Source], *, threshold: float = ..., top_k: int = ..., exif: Exif = ...
    ) -> list[ImageDetections]: ...
    def __call__(
        self,
        images: Source | Iterable[Source],
        *,
        threshold: float = THRESHOLD,
        top_k: int = TOP_K,
        exif: Exif = "apply",
    ) -> ImageDetections | list[ImageDetections]:
        """Detect objects in one image, or in many, which are read one after the other.

        Args:
            images: one image, see `read_image`, or an iterable of images.
            threshold: detections with a lower score are left out; 0 keeps those that evaluation scores.
            top_k: largest number of detections per image.
            exif: see `read_image`; boxes are in pixels of the image that it returns.

        Returns:
            The detections of one image, or a list of those of each image in their order.

        Raises:
            InputError: a source is missing or not an image (of many, its number from 0 is named), or a limit is out of
                bounds.
            DetectionError: a score or box is not finite.
        """
        check_limits(threshold, top_k, exif)
        if isinstance(images, ONE_IMAGE) or not isinstance(images, Iterable):
            return self._detect(read_image(images, exif), threshold, top_k)
        found = []
        for number, source in enumerate(images):
            try:
                image = read_image(source, exif)
            except InputError as error:
                raise InputError(f"image {number}: {error}") from None
            found.append(self._detect(image, threshold, top_k))
        return found

    def predict(
        self, images: Iterable[Source], threshold: float = THRESHOLD, top_k: int = TOP_K, exif: Exif = "apply"
    ) -> list[Prediction]:
        """The detections of many images as plain lists, see `ImageDetections.to_dict`; arguments as in `__call__`.

        Raises:
            InputError: a source is missing or not an image, or a limit is out of bounds.
        """
        check_limits(threshold, top_k, exif)
        return [self._detect(read_image(source, exif), threshold, top_k).to_dict() for source in images]

    def _detect(self, image: Image.Image, threshold: float, top_k: int) -> ImageDetections:
        return self.detect_batch([self.prepare(image)], [Limits(threshold, top_k)])[0]

    def prepare(self, image: Image.Image) -> Item:
        """The image as the model takes it, resized as in evaluation. The model is not used: any thread may call it.

        Args:
            image: RGB, as `read_image` returns it.
        """
        size = (image.height, image.width)
        resized, _, _ = apply(image, NO_BOXES, NO_LABELS, evaluation_view(size, self._config.data.augment))
        return Item(resized, NO_BOXES, NO_LABELS, 0, size)

    @torch.no_grad()
    def detect_batch(self, items: Sequence[Item], limits: Sequence[Limits]) -> list[ImageDetections]:
        """The detections of images that have one `extent`, so that none is padded: each has its result to rounding.

        A batch of one image has the bits of `__call__`.

        Args:
            items: from `prepare`, at least one.
            limits: for each item.

        Raises:
            DetectionError: a score or box is not finite.
        """
        assert len({item.extent for item in items}) == 1, "images of different sizes would be padded"
        batch = collate(items, 0, 1.0).to(self._device)
        outputs = self._model(batch.images, batch.mask)
        by_top_k = {top_k: postprocess(outputs, batch.sizes, top_k) for top_k in {limit.top_k for limit in limits}}
        return [
            self._detections(by_top_k[limit.top_k][row], item.size, limit.threshold)
            for row, (item, limit) in enumerate(zip(items, limits, strict=True))
        ]

    def _detections(self, found: Mapping[str, torch.Tensor], size: Size, threshold: float) -> ImageDetections:
        if not all(torch.isfinite(found[key]).all() for key in ("scores", "boxes_xyxy")):  # NaN passes no threshold
            raise DetectionError("a score or box of the model is not finite; check that its weights are")
        found = sort_by_score(found)
        labels = found["labels"].tolist()
        rows = [  # the raw layout has labels without a category
            row
            for row, score in enumerate(found["scores"].tolist())
            if score >= threshold and labels[row] in self._category
        ]
        categories = [self._category[labels[row]] for row in rows]
        return ImageDetections(
            boxes_xyxy=found["boxes_xyxy"].float().cpu().numpy()[rows],
            scores=found["scores"].float().cpu().numpy()[rows],
            category_ids=np.array([category.id for category in categories], np.int64),
            labels=tuple(category.name for category in categories),
            size=size,
        )


def check_limits(threshold: float, top_k: int, exif: str) -> None:
    """Raise InputError if a limit is out of bounds."""
    if not 0 <= threshold <= 1 or top_k < 1:
        raise InputError(f"threshold {threshold} must lie in [0, 1] and top_k {top_k} must be at least 1")
    if exif not in get_args(Exif):
        raise InputError(f"exif {exif!r} must be one of {', '.join(get_args(Exif))}")


def read_image(source: Source, exif: Exif = "apply") -> Image.Image:
    """The image as RGB, without its EXIF tag, so that it is not turned twice.

    Args:
        source: a path, encoded JPEG or PNG bytes, a Pillow image, an array of integers 0 to 255, [h, w, 3] as RGB, or a
            tensor [3, h, w] as RGB, of integers 0 to 255 or of floats in [0, 1], which are rounded to 8 bits.
        exif: `apply` turns the image by its EXIF orientation, as viewers do; `ignore` keeps it as stored.

    Raises:
        InputError: the source is missing or not an image; the message names the path.
    """
    if isinstance(source, torch.Tensor):
        source = _array_of(source)
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
        raise InputError(f"{type(data).__name__} is not an image; give {FORMS}")
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
        raise InputError(
            f"an array of shape {list(array.shape)} is not an image; it must be [height, width, 3], RGB; "
            "give a batch as list(batch)"
        )
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise InputError(f"an array of {array.dtype} is not an image; its values must be integers from 0 to 255")
    return array.astype(np.uint8)


def _array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's pixels as an array that `_pixels` checks."""
    if tensor.ndim != 3 or tensor.shape[0] != 3 or not tensor.numel():
        raise InputError(
            f"a tensor of shape {list(tensor.shape)} is not an image; it must be [3, height, width], RGB; "
            "give a batch as list(batch), and turn [height, width, 3] by permute(2, 0, 1)"
        )
    pixels = tensor.detach().cpu().permute(1, 2, 0)
    if not pixels.is_floating_point():
        return pixels.numpy()
    pixels = pixels.double()
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise InputError(
            f"a tensor of {tensor.dtype} with values from {low:g} to {high:g} is not an image; floats must lie in "
            "[0, 1], not normalised by mean and deviation"
        )
    return (pixels * 255).round().to(torch.uint8).numpy()
