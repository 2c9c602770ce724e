"""Box arithmetic on tensors whose last axis is 4; every name contains the format.

Nothing here checks values: a NaN stays a NaN and is found where losses are summed. Inputs must be float32, because
bfloat16 resolves a coordinate only to 1/256 of the image.
"""

import torch
from torch import Tensor

_TINY = 1e-12  # far below the area of a pixel in relative units; avoids division by zero for empty boxes


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Centre and size [..., 4] to corners [..., 4], in the same unit."""
    centre, size = boxes_cxcywh.split(2, dim=-1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Corners [..., 4] to centre and size [..., 4], in the same unit."""
    low, high = boxes_xyxy.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """GIoU (arXiv 1902.09630) of pairs of boxes, with broadcasting: [..., 4] and [..., 4] -> [...].

    It is element-wise, because a matrix of all pairs grows with the square of the number of boxes.
    """
    a_low, a_high = a_xyxy.split(2, dim=-1)
    b_low, b_high = b_xyxy.split(2, dim=-1)
    inter = _area((torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0))
    union = _area(a_high - a_low) + _area(b_high - b_low) - inter
    hull = _area((torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).clamp(min=0))
    return inter / union.clamp(min=_TINY) - (hull - union) / hull.clamp(min=_TINY)


def _area(sizes: Tensor) -> Tensor:
    """Width times height, [..., 2] -> [...]."""
    width, height = sizes.unbind(-1)  # not `prod`, whose backward looks for zeros and makes the host wait
    return width * height


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of x in [0, 1], with x and 1 - x clamped to at least `eps` (the published value)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def apply_delta(delta: Tensor, reference: Tensor) -> Tensor:
    """Add a box head's output [..., 4] in logit space to its reference: a point [..., 2] or a box [..., 4].

    Returns:
        boxes_cxcywh [..., 4] in (0, 1) (arXiv 2010.04159, appendix A.3).
    """
    logit = inverse_sigmoid(reference)
    if reference.shape[-1] == 4:
        return (delta + logit).sigmoid()
    return torch.cat([delta[..., :2] + logit, delta[..., 2:]], dim=-1).sigmoid()
