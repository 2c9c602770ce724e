"""COCO AP of a model over a validation split: each image exactly once, at any number of ranks.

Every rank runs its share of the images. Only compact detections are gathered, and rank 0 scores them. Raises
DetectionError if an image was lost or evaluated twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config import DataConfig, EvaluationConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import EvalLoader
from pipeline.data.worker_pool import WorkerPool
from pipeline.errors import DetectionError
from pipeline.evaluation.backends.select import load_backend
from pipeline.evaluation.coco import METRICS, Scores, coco_scores, ground_truth, summarise
from pipeline.evaluation.detections import Detections, concatenate, gather, gather_objects
from pipeline.evaluation.tta import Found, eval_sizes_of, merge, unmirror
from pipeline.logs import get_logger
from pipeline.model.postprocess import postprocess, sort_by_score
from pipeline.progress import Progress
from pipeline.runs.evaluations import SUBSET
from pipeline.runtime import Runtime

PUBLISHED_TOP_K = 100  # detections per image of the published numbers
LOWER = ("AR1", "AR10")  # metrics at limits that `evaluation.top_k` does not change

log = get_logger("evaluator")


@dataclass(frozen=True)
class Result:
    """One evaluation."""

    scores: Scores
    detections: Detections  # sorted by (image id, order)
    added: dict[str, float] = field(default_factory=dict)  # `AP_top300`, ...; `images` if only a subset was evaluated

    @property
    def metrics(self) -> dict[str, float]:
        """By coco.METRICS, and `added`; -1 where the ground truth has no object of a size class."""
        return self.scores.metrics | self.added


class Evaluator:
    """Runs a model over the batches of an EvalLoader. The ground truth is read once, on rank 0, and kept.

    The views of an image are merged as soon as the last view of its group has run. So only `evaluation.top_k`
    detections of an image are kept, for any number of views.
    """

    def __init__(
        self, loader: EvalLoader, data: DataConfig, runtime: Runtime, evaluation: EvaluationConfig | None = None
    ) -> None:
        self.loader = loader
        self.evaluation = evaluation or EvaluationConfig()
        self.data = data
        self.runtime = runtime
        labels = loader.index.labels(data.labels)
        self._categories = np.full(max(labels.values()) + 1, -1, np.int64)  # category id of each label, -1 = none
        self._categories[list(labels.values())] = list(labels)

    def run(self, model: nn.Module) -> Result | None:
        """Evaluate; a collective, so every rank must call it. Returns None on all ranks but 0.

        Args:
            model: images f32 [N, 3, H, W], mask bool [N, H, W] -> `pred_logits`, `pred_boxes`. It runs in eval mode
                without gradients; afterwards the mode of each module is restored.

        Raises:
            DetectionError: values that are not finite, or images that were lost or evaluated twice.
        """
        parts: list[Detections] = []
        seen: list[int] = []
        bar = Progress(self.loader.images, "evaluation", "image", rate=True) if self.runtime.is_main else None
        with evaluation_mode(model), bar or nullcontext():
            for images, found in self.detect(model, self.loader):
                seen += images
                parts.append(found)
                if bar:
                    bar.advance(len(images))
        detections = gather(concatenate(parts), self.runtime)
        shares = gather_objects(seen, self.runtime)
        if detections is None or shares is None:
            return None
        return self.score([image for share in shares for image in share], detections)

    def score(self, images: Sequence[int], detections: Detections) -> Result:
        """Score the detections of a whole evaluation.

        Args:
            images: ids of the images that were evaluated, in any order.
            detections: theirs, in any order of images.

        Raises:
            DetectionError: see `run`.
        """
        checked = self._checked_images(images)
        ordered = detections.check_and_sort(checked, self.loader.index.category_ids)
        published = ordered[ordered.orders < PUBLISHED_TOP_K]
        scores = coco_scores(self._ground_truth, published, checked, self.evaluation.backend)
        return Result(scores, ordered, self._at_top_k(ordered, checked) | self._size_of_subset(checked))

    def _at_top_k(self, detections: Detections, images: Sequence[int]) -> dict[str, float]:
        """The numbers of more detections than are published, by names such as `AP_top300`."""
        top_k = self.evaluation.top_k
        if top_k <= PUBLISHED_TOP_K:
            return {}
        scores = coco_scores(self._ground_truth, detections, images, self.evaluation.backend, limit=top_k)
        numbers = summarise(scores.arrays, scores.task.limits.index(top_k))
        return {f"{name.removesuffix('100')}_top{top_k}": numbers[name] for name in METRICS if name not in LOWER}

    def _size_of_subset(self, images: Sequence[int]) -> dict[str, float]:
        """The number of images, and a warning, if these are not all."""
        count, existing = len(images), len(self.loader.index)
        if count == existing:
            return {}
        log.warning("evaluation.max_images: a quick look at %d of %d images, not AP of the data set", count, existing)
        return {SUBSET: float(count)}

    def detect(self, model: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[list[int], Detections]]:
        """Of each group its image ids and their merged detections.

        Args:
            model: see `run`; within `evaluation_mode`.
            batches: of the loader: each group in all of its sizes before the next one.
        """
        merge_iou, top_k = self.evaluation.merge_iou, self.evaluation.top_k
        views: list[list[Found]] = []  # of the current group: by view, by image
        images: list[int] = []
        for batch, eval_size in zip(batches, cycle(self.loader.eval_sizes), strict=False):
            moved = batch.to(self.runtime.device)
            found: Sequence[Found] = postprocess(model(moved.images, moved.mask), moved.sizes, top_k)
            if eval_size.flip:
                found = [unmirror(f, width) for f, width in zip(found, batch.sizes[:, 1].tolist(), strict=True)]
            if views and batch.image_ids.tolist() != images:
                raise DetectionError(
                    f"images {images} need {len(self.loader.eval_sizes)} views, but view {len(views) + 1} has images "
                    f"{batch.image_ids.tolist()}"
                )
            images = batch.image_ids.tolist()
            views.append(list(found))
            if len(views) == len(self.loader.eval_sizes):
                best = (merge(of_image, merge_iou, top_k) for of_image in zip(*views, strict=True))
                yield images, concatenate([self._detections(*pair) for pair in zip(images, best, strict=True)])
                views = []

    @cached_property
    def _ground_truth(self) -> dict[str, Any]:
        return ground_truth(self.loader.data)

    def _detections(self, image: int, found: Found) -> Detections:
        """An image's top detections, without labels that have no category (gaps of the raw layout).

        Sorting changes no number, because pycocotools also sorts by score, with a stable sort.
        """
        found = sort_by_score(found)
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

    def _checked_images(self, seen: Sequence[int]) -> list[int]:
        expected = self.loader.index.samples.image_id[[row for group in self.loader.groups for row in group]]
        unique, counts = np.unique(np.array(seen, np.int64), return_counts=True)
        lost, twice = np.setdiff1d(expected, unique), unique[counts > 1]
        if len(lost) or len(twice):
            raise DetectionError(
                f"of {len(expected)} images {len(lost)} were not evaluated and {len(twice)} more than once, e.g. "
                f"{[*lost[:3].tolist(), *twice[:3].tolist()]}; every rank must use the same data.val and "
                "evaluation.micro_batch"
            )
        images: list[int] = unique.tolist()
        return images


def build_evaluator(
    data: DataConfig,
    evaluation: EvaluationConfig,
    runtime: Runtime,
    pool: WorkerPool | None = None,
) -> Evaluator:
    """An Evaluator over `data.val` with the views of the section `evaluation`.

    Args:
        data: `val` and how it is read.
        evaluation: views, the images of a group, and what is kept.
        runtime: this rank.
        pool: processes to share with another loader; by default it has its own.

    Raises:
        ConfigError, ShardError: see `EvalLoader`; or the package of `evaluation.backend` is not installed.
    """
    eval_sizes = eval_sizes_of(evaluation, data.augment)
    load_backend(evaluation.backend)  # an error before any work
    rank, world = runtime.rank, runtime.world
    loader = EvalLoader(data, evaluation.micro_batch, rank, world, pool, eval_sizes, evaluation.max_images)
    return Evaluator(loader, data, runtime, evaluation)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context in which `model` computes without gradients and dropout; then each module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
