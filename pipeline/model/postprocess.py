"""Converts a model's outputs to scored boxes in pixels, without a threshold or NMS.

`top_detections` does the same for a whole batch as tensors, for exported graphs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.model.boxes import cxcywh_to_xyxy


@torch.no_grad()
def postprocess(outputs: Mapping[str, Any], sizes: Tensor, top_k: int = 100) -> list[dict[str, Tensor]]:
    """Each image's detections as published.

    A baseline's detections are its own, best first.

    A sigmoid head gives the best (query, class) pairs, best first; a query may appear with several classes. A softmax
    head gives every query with its best class that is not "no object", in the order of the queries (`sort_by_score`
    sorts them); if `top_k` is smaller than the number of queries, the best ones.

    Args:
        outputs: `pred_logits` [N, Q, C] and `pred_boxes` cxcywh [N, Q, 4]; of a softmax head also `softmax: True`; of a
            baseline `detections` and `input_sizes`, see `baselines.Baseline`.
        sizes: [N, 2] original height and width in pixels.
        top_k: maximum detections per image.

    Returns:
        Per image `scores` float32 [K], `labels` int64 [K], `boxes_xyxy` float32 [K, 4] in pixels of the original image,
        which they may exceed.
    """
    if "detections" in outputs:
        ratios = sizes.to("cpu", torch.float32) / outputs["input_sizes"]
        return [_rescale(*part, top_k) for part in zip(outputs["detections"], ratios, strict=True)]
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


def sort_by_score(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sort one image's detections by descending score; equal scores keep their order, which decides ties in COCO AP."""
    order = found["scores"].argsort(descending=True, stable=True)
    return {key: values[order] for key, values in found.items()}


def _rescale(found: Mapping[str, Tensor], ratio: Tensor, top_k: int) -> dict[str, Tensor]:
    """A baseline's detections; `ratio` (h, w) from the network's input to the original."""
    best = {name: value[:top_k] for name, value in found.items()}
    scale = ratio.flip(0).repeat(2).to(best["boxes_xyxy"])
    return best | {"boxes_xyxy": best["boxes_xyxy"] * scale}
