"""Test-time augmentation: which looks an image is given, and how their detections become one list.

Used by `evaluator.py`. The paper has rows with "horizontal flip and multi-scale testing" (Table 3) and says neither
which sizes nor how results were merged. Here, of detections of one class that overlap more than `merge_iou`, from
whatever looks, the one with the highest score stays: non-maximum suppression over all looks together.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from pipeline.config import AugmentConfig, EvaluationConfig
from pipeline.data.transforms import Look

Found = Mapping[str, Tensor]  # one image's `scores` [k], `labels` [k], `boxes_xyxy` [k, 4]


def looks_of(evaluation: EvaluationConfig, augment: AugmentConfig) -> tuple[Look, ...]:
    """The looks of the section `evaluation`: each size, then each size's mirror image after it.

    `max_size` grows and shrinks with the shortest side, so that no look has another aspect ratio.
    """
    sizes = evaluation.scales or (augment.eval_size,)
    flips = (False, True) if evaluation.flip else (False,)
    return tuple(
        Look(size, round(augment.max_size * size / augment.eval_size), flip) for size in sizes for flip in flips
    )


def mirrored(found: Found, width: int) -> dict[str, Tensor]:
    """Detections of a mirrored image in the coordinates of the image, which is `width` pixels wide."""
    left, top, right, bottom = found["boxes_xyxy"].unbind(-1)
    return {**found, "boxes_xyxy": torch.stack([width - right, top, width - left, bottom], dim=-1)}


def merge(views: Sequence[Found], iou: float, top_k: int) -> dict[str, Tensor]:
    """One image's detections out of those of several looks, in the same coordinates.

    Args:
        views: each look's detections.
        iou: of two detections of a class that overlap more, the one with the lower score is left out.
        top_k: most detections.

    Returns:
        Detections by descending score. A single look is returned as it came: nothing is left out.
    """
    if len(views) == 1:
        return dict(views[0])
    all_of = {key: torch.cat([view[key] for view in views]) for key in views[0]}
    kept = batched_nms(all_of["boxes_xyxy"].float(), all_of["scores"].float(), all_of["labels"], iou)[:top_k]
    return {key: values[kept] for key, values in all_of.items()}
