"""From pictures to named boxes: what a trained checkpoint is for.

Used by `jobs.predict`, `jobs.demo` and `pyfunc_model.py` (the registered model). A picture is resized and normalised as
in evaluation and goes through the model alone, unpadded, so its result does not depend on its neighbours. A file that
is missing or is no picture is an InputError that names it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad

from pipeline.checkpoint import Inference
from pipeline.data.batch import Item, collate
from pipeline.data.images import MAX_BYTES, decode, to_rgb
from pipeline.data.transforms import apply, evaluation_view
from pipeline.errors import InputError, ShardError
from pipeline.evaluation.drawing import Prediction
from pipeline.model.postprocess import best_first, postprocess

Source = bytes | str | Path | Image.Image
THRESHOLD, TOP_K = 0.3, 100


class Predictor:
    """A loaded checkpoint that takes pictures."""

    def __init__(self, inference: Inference, device: str | torch.device | None = None) -> None:
        self._config = inference.config
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = inference.model.to(self._device).eval()
        raw = inference.config.data.labels == "raw"
        self._category = {c.id if raw else k: c for k, c in enumerate(inference.categories)}  # by label

    @torch.no_grad()
    def predict(self, images: Sequence[Source], threshold: float = THRESHOLD, top_k: int = TOP_K) -> list[Prediction]:
        """Detect objects, one picture at a time.

        Args:
            images: encoded JPEG or PNG bytes, paths, or Pillow images; orientation as stored.
            threshold: detections with a lower score are left out; 0 keeps what evaluation scores.
            top_k: detections considered per picture.

        Raises:
            InputError: a source that is missing or no picture, or senseless limits.
        """
        if not 0 <= threshold <= 1 or top_k < 1:
            raise InputError(f"threshold {threshold} must lie in [0, 1] and top_k {top_k} must be at least 1")
        return [self._one(read_image(source), threshold, top_k) for source in images]

    def _one(self, image: Image.Image, threshold: float, top_k: int) -> Prediction:
        size = (image.height, image.width)
        no_boxes, no_labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        view = evaluation_view(size, self._config.data.augment)
        resized, _, _ = apply(image, no_boxes, no_labels, view)
        batch = collate([Item(resized, no_boxes, no_labels, 0, size)], 0, 1.0).to(self._device)
        # a long thin picture is padded to the deepest stride, below which the model has no features
        missing = [max(0, self._model.stride - side) for side in batch.mask.shape[:0:-1]]
        edges = (0, missing[0], 0, missing[1])
        outputs = self._model(pad(batch.images, edges), pad(batch.mask, edges, value=True))
        found = best_first(postprocess(outputs, batch.sizes, top_k)[0])
        prediction = Prediction(boxes=[], scores=[], labels=[], category_ids=[])
        values = (found["scores"].tolist(), found["labels"].tolist(), found["boxes_xyxy"].tolist())
        for score, label, (left, top, right, bottom) in zip(*values, strict=True):
            category = self._category.get(label)  # the raw layout has labels that stand for no category
            if category is None or score < threshold:
                continue
            prediction["boxes"].append([left, top, right - left, bottom - top])
            prediction["scores"].append(score)
            prediction["labels"].append(category.name)
            prediction["category_ids"].append(category.id)
        return prediction


def read_image(source: Source) -> Image.Image:
    """The picture as RGB in stored orientation, as training reads it. Raises InputError naming the source."""
    if isinstance(source, Image.Image):
        return to_rgb(source)
    name, data = "the picture", source
    if isinstance(data, str | Path):
        path = Path(data)
        name = str(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise InputError(f"{name} has more than {MAX_BYTES:,} bytes; scale it down")
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read picture {name}: {error.strerror}") from None
    try:
        return decode(data)
    except ShardError as error:
        raise InputError(f"{name} {error}") from None
