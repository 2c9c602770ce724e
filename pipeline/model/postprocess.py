"""From a detector's outputs to scored boxes in pixels. Used by evaluation and prediction; adds no threshold, no NMS."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.model.boxes import cxcywh_to_xyxy


@torch.no_grad()
def postprocess(outputs: Mapping[str, Any], sizes: Tensor, top_k: int = 100) -> list[dict[str, Tensor]]:
    """The best detections of each image; in set prediction (query, class) pairs, so that a query may be of two classes.

    Args:
        outputs: `pred_logits` [N, Q, C] and `pred_boxes` cxcywh [N, Q, 4], or what `baselines.Baseline` returns.
        sizes: [N, 2] original height and width in pixels.
        top_k: detections per image; fewer where there are not so many.

    Returns:
        Per image `scores` float32 [K] in descending order, `labels` int64 [K], `boxes_xyxy` float32 [K, 4] in pixels
        of the original image, which they may exceed.
    """
    if "detections" in outputs:
        ratios = sizes.to("cpu", torch.float32) / outputs["input_sizes"]
        return [_rescaled(*part, top_k) for part in zip(outputs["detections"], ratios, strict=True)]
    logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
    classes = logits.shape[2]
    scores, index = logits.flatten(1).sigmoid().topk(min(top_k, logits[0].numel()), dim=1)
    corners = cxcywh_to_xyxy(boxes).gather(1, (index // classes)[..., None].expand(-1, -1, 4))
    scale = sizes.to(boxes).flip(1).repeat(1, 2)[:, None]
    found = zip(scores, index % classes, corners * scale, strict=True)
    return [{"scores": s, "labels": c, "boxes_xyxy": b} for s, c, b in found]


def _rescaled(found: Mapping[str, Tensor], ratio: Tensor, top_k: int) -> dict[str, Tensor]:
    """A baseline's detections, which are sorted by score; `ratio` (h, w) from the network's input to the original."""
    best = {name: value[:top_k] for name, value in found.items()}
    scale = ratio.flip(0).repeat(2).to(best["boxes_xyxy"])
    return best | {"boxes_xyxy": best["boxes_xyxy"] * scale}
