"""COCO AP of a model over a validation split, each image exactly once, whatever the number of ranks.

Used by `worker.py` after an epoch and by `jobs.evaluate`. Every rank runs its own share; only compact detections
travel, and rank 0 alone scores them. Fails with DetectionError if an image was lost or seen twice on the way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import DataConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import EvalLoader
from pipeline.data.progress import Progress
from pipeline.errors import DetectionError
from pipeline.evaluation.coco import Scores, coco_scores, ground_truth
from pipeline.evaluation.detections import Detections, concatenate, gather, gather_objects
from pipeline.model.postprocess import best_first, postprocess
from pipeline.runtime import Runtime

TOP_K = 100  # as published; pycocotools scores no more per image and category


@dataclass(frozen=True)
class Result:
    """One evaluation."""

    scores: Scores
    detections: Detections  # sorted by (image id, order)

    @property
    def metrics(self) -> dict[str, float]:
        """By coco.METRICS; -1 where the ground truth has no object of a size class."""
        return self.scores.metrics


class Evaluator:
    """Runs a model over the batches of an EvalLoader; the ground truth is read once, on rank 0, and kept."""

    def __init__(self, loader: EvalLoader, data: DataConfig, runtime: Runtime) -> None:
        self.loader = loader
        self.data = data
        self.runtime = runtime
        labels = loader.index.labels(data.labels)
        self._categories = np.full(max(labels.values()) + 1, -1, np.int64)  # category id of each label, -1 = none
        self._categories[list(labels.values())] = list(labels)

    def run(self, model: nn.Module) -> Result | None:
        """Evaluate; a collective, so every rank must call it. Returns None on all ranks but 0.

        Args:
            model: images f32 [N, 3, H, W], mask bool [N, H, W] -> `pred_logits`, `pred_boxes`. It runs in eval mode
                without gradients; the mode of each of its modules is restored.

        Raises:
            DetectionError: values that are not finite, or images that were lost or evaluated twice.
        """
        parts: list[Detections] = []
        seen: list[int] = []
        with _evaluation_mode(model):
            for batch in self._batches():
                moved = batch.to(self.runtime.device)
                results = postprocess(model(moved.images, moved.mask), moved.sizes, TOP_K)
                images = batch.image_ids.tolist()
                parts += [self._detections(image, found) for image, found in zip(images, results, strict=True)]
                seen += images
        detections = gather(concatenate(parts), self.runtime)
        shares = gather_objects(seen, self.runtime)
        if detections is None or shares is None:
            return None
        images = self._checked_images([image for share in shares for image in share])
        ordered = detections.check_and_sort(images, self.loader.index.category_ids)
        return Result(coco_scores(self._ground_truth, ordered, images), ordered)

    @cached_property
    def _ground_truth(self) -> dict[str, Any]:
        return ground_truth(self.data.val)

    def _detections(self, image: int, found: dict[str, Tensor]) -> Detections:
        """An image's top detections; a label that stands for no category (a gap of the raw layout) is dropped.

        Sorting changes no number: pycocotools sorts by score, too, and as stably.
        """
        found = best_first(found)
        labels = found["labels"].cpu().numpy()
        boxes = found["boxes_xyxy"].float().cpu().numpy()
        known = labels < len(self._categories)
        categories = np.where(known, self._categories[np.where(known, labels, 0)], -1)
        detections = Detections(
            np.full(len(labels), image, np.int64),
            np.arange(len(labels), dtype=np.int32),
            categories,
            np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
            found["scores"].float().cpu().numpy(),
        )
        return detections[categories >= 0]

    def _checked_images(self, seen: list[int]) -> list[int]:
        expected = self.loader.index.samples.image_id
        unique, counts = np.unique(np.array(seen, np.int64), return_counts=True)
        lost, twice = np.setdiff1d(expected, unique), unique[counts > 1]
        if len(lost) or len(twice):
            raise DetectionError(
                f"of {len(expected)} images {len(lost)} were not evaluated and {len(twice)} more than once, e.g. "
                f"{[*lost[:3].tolist(), *twice[:3].tolist()]}; every rank must use the same data.val and micro_batch"
            )
        return unique.tolist()

    def _batches(self) -> Iterator[Batch]:
        if not self.runtime.is_main:
            yield from self.loader
            return
        with Progress(len(self.loader), "evaluation", "group") as bar:
            for batch in self.loader:
                yield batch
                bar.advance()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
