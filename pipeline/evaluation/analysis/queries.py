"""Recall over the number of queries: how many of a model's queries are worth keeping. Never fails."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from pipeline.evaluation.analysis.matching import match
from pipeline.evaluation.analysis.result import QueryRecall
from pipeline.evaluation.analysis.table import Table
from pipeline.evaluation.backends.base import IOU_THRESHOLDS, Floats
from pipeline.evaluation.coco import mean_known

COUNTS = (1, 2, 3, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 900)


class BestClass(nn.Module):
    """A detector that gives each query its best class only, so that its detections are its queries, best first.

    Run it through an `Evaluator` with one view and `evaluation.top_k` of at least the number of queries. Models whose
    queries have one class in any case (softmax heads), and baselines, which have no queries, are not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        """As the model's own, with the logits of all other classes at minus infinity, which is score 0."""
        outputs: Mapping[str, Any] = self.model(images, mask)
        if "detections" in outputs or outputs.get("softmax"):
            return dict(outputs)
        logits = outputs["pred_logits"]
        best = logits.max(-1, keepdim=True)
        only = logits.new_full(logits.shape, -float("inf")).scatter(-1, best.indices, best.values)
        return {**outputs, "pred_logits": only}


def query_recall(table: Table) -> QueryRecall:
    """Recall of the best queries of each image, averaged over IoUs and over the categories of the objects.

    Args:
        table: one detection of each query, built without a limit of detections.
    """
    most = int(table.found.image_ranks.max(initial=0)) + 1
    counts = (*(count for count in COUNTS if count < most), most)
    anything = replace(
        table,
        objects=replace(table.objects, categories=np.zeros_like(table.objects.categories)),
        found=replace(table.found, categories=np.zeros_like(table.found.categories), ranks=table.found.image_ranks),
    )
    return QueryRecall(
        queries=counts,
        recall=_recalls(table, table, counts),
        box_recall=_recalls(anything, table, counts),
    )


def _recalls(matched: Table, table: Table, counts: Sequence[int]) -> tuple[float, ...]:
    """Recall for each of `counts`: `matched` says what may be matched, `table` to which category objects belong."""
    crowd = table.objects.crowd
    matches = match(matched, crowd)
    threshold, column = np.nonzero((matches.objects >= 0) & ~np.append(crowd, True)[matches.objects])
    category = table.objects.categories[matches.objects[threshold, column]]
    rank = table.found.image_ranks[matches.found[column]]
    positives = table.positives(crowd)
    recalls = []
    for count in counts:
        cell = (threshold * len(positives) + category)[rank < count]
        found = np.bincount(cell, minlength=len(IOU_THRESHOLDS) * len(positives)).reshape(len(IOU_THRESHOLDS), -1)
        recall: Floats = np.where(positives > 0, found / np.maximum(positives, 1), -1.0)
        recalls.append(mean_known(recall))
    return tuple(recalls)
