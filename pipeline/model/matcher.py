"""Bipartite matching of predictions and ground truth, for each image and decoder layer.

One device-to-host transfer serves all layers and images of a batch; SciPy computes the assignment on the host.
Non-finite costs become large, so that a diverging model reaches the engine's non-finite check instead of failing here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.model.boxes import cxcywh_to_xyxy, generalized_iou

_FORBIDDEN = 1e6  # far above any cost of finite predictions, and exact in float32
MATCHER_CHUNK_CELLS = 2**22  # bounds the temporaries of many objects times all tokens of the encoder


@dataclass(frozen=True)
class GroundTruth:
    """The T objects of N images, concatenated."""

    labels: Tensor  # int64 [T]
    boxes_cxcywh: Tensor  # float32 [T, 4], relative to each un-padded image
    images: Tensor  # int64 [T], position of the object's image in the batch
    counts: tuple[int, ...]  # objects of each image, on the host

    @staticmethod
    def of(targets: Sequence[dict[str, Tensor]]) -> "GroundTruth":
        """Concatenate one `{"labels": [n], "boxes": [n, 4]}` per image."""
        labels = torch.cat([target["labels"] for target in targets]).long()
        boxes = torch.cat([target["boxes"] for target in targets]).float()
        counts = tuple(len(target["labels"]) for target in targets)
        images = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(labels.device, non_blocking=True)
        return GroundTruth(labels, boxes.view(-1, 4), images, counts)


@dataclass(frozen=True)
class Predictions:
    """The predictions of L layers with the same Q queries."""

    logits: Tensor  # float32 [L, N, Q, C]
    boxes_cxcywh: Tensor  # float32 [L, N, Q, 4]


@dataclass(frozen=True)
class Match:
    """Matched queries and objects of each layer: 4 index vectors [L * M], layer by layer, M pairs each."""

    layers: Tensor
    images: Tensor
    queries: Tensor
    objects: Tensor  # index into GroundTruth


class HungarianMatcher:
    """Costs as published: class, L1 and negative GIoU, weighted by the `loss` section.

    The class cost is the change of the focal loss (Deformable DETR), or the negative probability (DETR's softmax).
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    @torch.no_grad()
    def __call__(self, predictions: Sequence[Predictions], truths: Sequence[GroundTruth]) -> list[Match]:
        """Match each set of predictions with its ground truth (the encoder's has other labels than the decoder's).

        Raises:
            IndexError: a label exceeds the logits (on a CUDA device: a device assertion).
        """
        costs = [self.costs(p, t) for p, t in zip(predictions, truths, strict=True)]
        flat = torch.cat([cost.flatten() for cost in costs])
        host = np.split(flat.cpu().numpy(), np.cumsum([cost.numel() for cost in costs])[:-1])
        pairs = [
            _assign(part.reshape(cost.shape), truth.counts)
            for part, cost, truth in zip(host, costs, truths, strict=True)
        ]
        indices = torch.from_numpy(np.concatenate(pairs, axis=1)).to(flat.device, non_blocking=True)
        return [Match(*part) for part in indices.split([p.shape[1] for p in pairs], dim=1)]

    def costs(self, predictions: Predictions, truth: GroundTruth) -> Tensor:
        """Finite costs [L, T, Q] of every object with the queries of its own image."""
        scores = predictions.logits
        if self.config.classification == "softmax":
            scores = scores.softmax(-1)
        layers, _, queries, _ = scores.shape
        step = max(1, MATCHER_CHUNK_CELLS // (layers * queries))
        parts = zip(truth.images.split(step), truth.labels.split(step), truth.boxes_cxcywh.split(step), strict=True)
        return torch.cat([self._costs(scores, predictions.boxes_cxcywh, *part) for part in parts], dim=1)

    def _costs(
        self, scores: Tensor, boxes_cxcywh: Tensor, images: Tensor, labels: Tensor, objects_cxcywh: Tensor
    ) -> Tensor:
        cfg = self.config
        of_class = self._class_cost(scores.transpose(2, 3)[:, images, labels])
        boxes, objects = boxes_cxcywh[:, images], objects_cxcywh[:, None]
        distance = (boxes - objects).abs().sum(-1)
        giou = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(objects))
        cost = cfg.class_cost * of_class + cfg.bbox_cost * distance - cfg.giou_cost * giou
        return cost.nan_to_num(nan=_FORBIDDEN, posinf=_FORBIDDEN, neginf=_FORBIDDEN)

    def _class_cost(self, scores: Tensor) -> Tensor:
        """The cost of logits, or of probabilities for a softmax head."""
        cfg = self.config
        if cfg.classification == "softmax":
            return -scores
        p = scores.sigmoid()
        rest = 1 - p
        positive = cfg.focal_alpha * rest**cfg.focal_gamma * -(p + 1e-8).log()
        negative = (1 - cfg.focal_alpha) * p**cfg.focal_gamma * -(rest + 1e-8).log()
        return positive - negative


def _assign(cost: "np.ndarray[Any, Any]", counts: tuple[int, ...]) -> "np.ndarray[Any, Any]":
    """Indices [4, L * M] (layer, image, query, object) of the cheapest assignment of each layer and image."""
    found = [np.empty((4, 0), np.int64)]
    starts = np.cumsum((0, *counts))
    for layer, of_layer in enumerate(cost):
        for image, (start, count) in enumerate(zip(starts, counts, strict=False)):
            objects, queries = linear_sum_assignment(of_layer[start : start + count])
            position = np.broadcast_to(np.array([[layer], [image]]), (2, len(objects)))
            found.append(np.concatenate([position, queries[None], objects[None] + start]))
    return np.concatenate(found, axis=1)
