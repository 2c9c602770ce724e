"""From a model's outputs to scored boxes in pixels. Used by evaluation and prediction; adds no threshold and no NMS.

`top_detections` is the same for a batch as tensors, which a graph can hold; `export` uses it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.model.boxes import cxcywh_to_xyxy


@torch.no_grad()
def postprocess(outputs: Mapping[str, Any], sizes: Tensor, top_k: int = 100) -> list[dict[str, Tensor]]:
    """The best (query, class) pairs of each image; a query may appear under several classes, as published.

    Args:
        outputs: `pred_logits` [N, Q, C] and `pred_boxes` cxcywh [N, Q, 4].
        sizes: [N, 2] original height and width in pixels.
        top_k: pairs per image; fewer where Q * C is smaller.

    Returns:
        Per image `scores` float32 [K] in descending order, `labels` int64 [K], `boxes_xyxy` float32 [K, 4] in pixels
        of the original image, which they may exceed.
    """
    found = zip(*top_detections(outputs, sizes, top_k), strict=True)
    return [{"scores": s, "labels": c, "boxes_xyxy": b} for s, c, b in found]


def top_detections(outputs: Mapping[str, Any], sizes: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`postprocess` for the batch at once: scores [N, K], labels [N, K], boxes_xyxy [N, K, 4]."""
    logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
    classes = logits.shape[2]
    scores, index = logits.flatten(1).sigmoid().topk(min(top_k, logits[0].numel()), dim=1)
    corners = cxcywh_to_xyxy(boxes).gather(1, (index // classes)[..., None].expand(-1, -1, 4))
    scale = sizes.to(boxes).flip(1).repeat(1, 2)[:, None]
    return scores, index % classes, corners * scale
