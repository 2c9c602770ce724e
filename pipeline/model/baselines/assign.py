"""Assigns anchors to objects, for the detectors that are not set predictors.

Three published rules are functions of (objects, anchors) -> the object of every anchor. None of them stores a matrix of
all objects by all anchors: with 2,000 objects and Faster R-CNN's 267,000 anchors it would take 2 GB.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

BACKGROUND, IGNORED = -1, -2
ATSS_CANDIDATES = 9  # k of the paper: candidate anchors of an object in each level
ATSS_SCALE = 8  # side of ATSS's anchors, in strides
CENTER_RADIUS = 1.5  # strides around an object's centre in which FCOS has positives
FCOS_RANGE = (
    4,
    8,
)  # strides from a location to an object's far side; open at the first and last level
ASSIGN_CHUNK_CELLS = 2**20  # of a matrix of objects by anchors: 4 MiB, near a core's cache


def by_iou(boxes_xyxy: Tensor, anchors: Tensor, low: float, high: float) -> Tensor:
    """Overlap with thresholds (Faster R-CNN's proposals, arXiv 1506.01497; RetinaNet, arXiv 1708.02002).

    Args:
        boxes_xyxy: objects [M, 4].
        anchors: [A, 4].
        low: below this IoU with every object an anchor is background.
        high: from this IoU on it is assigned to the object; in between it is ignored. An object's best anchors (ties
            included) are assigned to the object that they overlap most, at any IoU.

    Returns:
        int64 [A]: an object's index in `boxes_xyxy`, BACKGROUND or IGNORED.
    """
    if len(boxes_xyxy) == 0:
        return _background(anchors)
    parts = anchors.split(max(1, ASSIGN_CHUNK_CELLS // len(boxes_xyxy)))
    overlap, owner = [], []
    best = boxes_xyxy.new_zeros(len(boxes_xyxy))
    for part in parts:
        iou = box_iou(boxes_xyxy, part)
        highest, objects = iou.max(dim=0)
        overlap.append(highest)
        owner.append(objects)
        best = torch.maximum(best, iou.max(dim=1).values)
    forced = torch.cat([_attains(box_iou(boxes_xyxy, part), best) for part in parts])
    highest, objects = torch.cat(overlap), torch.cat(owner)
    matched = torch.where(highest < low, BACKGROUND, torch.where(highest < high, IGNORED, objects))
    return torch.where(forced, objects, matched)


def by_center(boxes_xyxy: Tensor, anchors: Tensor, levels: Sequence[int], strides: Sequence[int]) -> Tensor:
    """FCOS with center sampling (arXiv 2006.09214).

    A location is assigned to an object if it is inside the object and near its centre. The distance to the object's
    far side must also fit the location's level. Of several objects the smallest gets the location.

    Args:
        boxes_xyxy: objects [M, 4].
        anchors: [A, 4]; only their centres count, level after level.
        levels: anchors of each level.
        strides: of each level, in pixels.

    Returns:
        int64 [A]: an object's index in `boxes_xyxy`, or BACKGROUND.
    """
    points = (anchors[:, :2] + anchors[:, 2:]) / 2
    stride = _per_anchor(strides, levels, anchors)
    nearest, farthest = stride * FCOS_RANGE[0], stride * FCOS_RANGE[1]
    nearest[: levels[0]], farthest[-levels[-1] :] = 0, torch.inf
    matched = _background(anchors)
    smallest = torch.full_like(stride, torch.inf)
    for start, part in _chunks(boxes_xyxy, len(anchors)):
        centres = (part[:, :2] + part[:, 2:]) / 2
        central = (points - centres[:, None]).abs().amax(2) < CENTER_RADIUS * stride
        sides = torch.cat([points - part[:, None, :2], part[:, None, 2:] - points], dim=2)  # [m, A, 4]
        reach = sides.amax(2)
        fits = central & (sides.amin(2) > 0) & (reach > nearest) & (reach < farthest)
        area, index = torch.where(fits, box_area(part)[:, None], torch.inf).min(dim=0)
        matched = torch.where(area < smallest, index + start, matched)
        smallest = torch.minimum(smallest, area)
    return matched


def by_atss(boxes_xyxy: Tensor, anchors: Tensor, levels: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Adaptive training sample selection (arXiv 1912.02424, algorithm 1).

    An object's candidates are the 9 anchors of each level with the nearest centres. Positives are candidates with an
    IoU of at least the candidates' mean plus their standard deviation, and with their centre inside the object. Of
    several objects the one with the highest IoU gets the anchor.

    Args:
        boxes_xyxy: objects [M, 4].
        anchors: as of `by_center`; for the IoU each is a square of 8 strides.
        levels: anchors of each level.
        strides: of each level, in pixels.

    Returns:
        int64 [A]: an object's index in `boxes_xyxy`, or BACKGROUND.
    """
    points = (anchors[:, :2] + anchors[:, 2:]) / 2
    half = ATSS_SCALE / 2 * _per_anchor(strides, levels, anchors)[:, None]
    squares = torch.cat([points - half, points + half], dim=1)
    matched = _background(anchors)
    highest = boxes_xyxy.new_zeros(len(anchors))
    for start, part in _chunks(boxes_xyxy, len(anchors)):
        candidates = _nearest(part, points, levels)  # [m, c]
        iou = _iou_of_pairs(part[:, None], squares[candidates])
        threshold = iou.mean(1) + iou.std(1)  # of the sample, as released
        at = points[candidates]
        inside = torch.cat([at - part[:, None, :2], part[:, None, 2:] - at], dim=2).amin(2) > 0
        rated = torch.where((iou >= threshold[:, None]) & inside, iou, 0)
        table = rated.new_zeros(len(part), len(anchors)).scatter_(1, candidates, rated)
        value, index = table.max(dim=0)
        matched = torch.where(value > highest, index + start, matched)
        highest = torch.maximum(highest, value)
    return matched


def _nearest(boxes_xyxy: Tensor, points: Tensor, levels: Sequence[int]) -> Tensor:
    """Indices of each object's candidates, level by level: [M, levels * 9]; fewer if a level is smaller."""
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    found, start = [], 0
    for level in points.split(list(levels)):
        distance = (level - centres[:, None]).square().sum(2)
        found.append(distance.topk(min(ATSS_CANDIDATES, len(level)), dim=1, largest=False).indices + start)
        start += len(level)
    return torch.cat(found, dim=1)


def _iou_of_pairs(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """IoU of pairs of boxes, with broadcasting: [..., 4] and [..., 4] -> [...]."""
    low, high = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2]), torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    areas = (a_xyxy[..., 2:] - a_xyxy[..., :2]).prod(-1) + (b_xyxy[..., 2:] - b_xyxy[..., :2]).prod(-1)
    return inter / (areas - inter)


def _attains(iou: Tensor, best: Tensor) -> Tensor:
    """Anchors that are the best of some object: [M, A] and [M] -> bool [A]."""
    return ((iou == best[:, None]) & (iou > 0)).any(dim=0)


def _background(anchors: Tensor) -> Tensor:
    return torch.full((len(anchors),), BACKGROUND, device=anchors.device)


def _per_anchor(values: Sequence[float], levels: Sequence[int], anchors: Tensor) -> Tensor:
    """A value of each level, repeated for its anchors: [A]."""
    return torch.cat([anchors.new_full((count,), value) for value, count in zip(values, levels, strict=True)])


def _chunks(boxes_xyxy: Tensor, anchors: int) -> list[tuple[int, Tensor]]:
    """(index of the first object, objects) of parts that are small enough to compare with all anchors."""
    step = max(1, ASSIGN_CHUNK_CELLS // (4 * anchors))
    return [(start, boxes_xyxy[start : start + step]) for start in range(0, len(boxes_xyxy), step)]
