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
    """Each image's detections as published.

    Of a baseline its own, best first.

    Of a sigmoid head the best (query, class) pairs, so that a query may appear under several classes, best first. Of a
    softmax head every query under its best class that is not "no object", in the order of the queries (`best_first`
    sorts them); where `top_k` is less than the queries, the best of them.

    Args:
        outputs: `pred_logits` [N, Q, C] and `pred_boxes` cxcywh [N, Q, 4]; of a softmax head also `softmax: True`; of a
            baseline `detections` and `input_sizes`, see `baselines.Baseline`.
        sizes: [N, 2] original height and width in pixels.
        top_k: detections per image; fewer where there are not as many.

    Returns:
        Per image `scores` float32 [K], `labels` int64 [K], `boxes_xyxy` float32 [K, 4] in pixels of the original image,
        which they may exceed.
    """
    if "detections" in outputs:
        ratios = sizes.to("cpu", torch.float32) / outputs["input_sizes"]
        return [_rescaled(*part, top_k) for part in zip(outputs["detections"], ratios, strict=True)]
    found = zip(*top_detections(outputs, sizes, top_k), strict=True)
    return [{"scores": s, "labels": c, "boxes_xyxy": b} for s, c, b in found]


def top_detections(outputs: Mapping[str, Any], sizes: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`postprocess` of set prediction for the batch at once: scores [N, K], labels [N, K], boxes_xyxy [N, K, 4]."""
    logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
    if outputs.get("softmax"):
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        queries = scores.topk(min(top_k, scores.shape[1]), dim=1).indices.sort(dim=1).values
        scores, labels = scores.gather(1, queries), labels.gather(1, queries)
    else:
        scores, index = logits.flatten(1).sigmoid().topk(min(top_k, logits[0].numel()), dim=1)
        queries, labels = index // logits.shape[2], index % logits.shape[2]
    corners = cxcywh_to_xyxy(boxes).gather(1, queries[..., None].expand(-1, -1, 4))
    scale = sizes.to(boxes).flip(1).repeat(1, 2)[:, None]
    return scores, labels, corners * scale


def best_first(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One image's detections by descending score; equal scores stay in their order, which decides ties in COCO AP."""
    order = found["scores"].argsort(descending=True, stable=True)
    return {key: values[order] for key, values in found.items()}


def _rescaled(found: Mapping[str, Tensor], ratio: Tensor, top_k: int) -> dict[str, Tensor]:
    """A baseline's detections; `ratio` (h, w) from the network's input to the original."""
    best = {name: value[:top_k] for name, value in found.items()}
    scale = ratio.flip(0).repeat(2).to(best["boxes_xyxy"])
    return best | {"boxes_xyxy": best["boxes_xyxy"] * scale}
