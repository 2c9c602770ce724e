"""Assignment of anchors to objects, against torchvision's matcher and plain versions of the papers' rules."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from pipeline.model.baselines import assign
from pipeline.model.baselines.assign import BACKGROUND, IGNORED, by_atss, by_center, by_iou

STRIDES = (8, 16, 32)


def grid(height: int, width: int) -> tuple[Tensor, list[int]]:
    """Anchors of one stride's size at every location of three levels, and how many each level has."""
    anchors, levels = [], []
    for stride in STRIDES:
        rows, columns = math.ceil(height / stride), math.ceil(width / stride)
        y, x = torch.meshgrid(torch.arange(rows) * stride, torch.arange(columns) * stride, indexing="ij")
        centre = torch.stack([x, y], dim=-1).reshape(-1, 2).float()
        anchors.append(torch.cat([centre - stride / 2, centre + stride / 2], dim=1))
        levels.append(rows * columns)
    return torch.cat(anchors), levels


def objects(count: int, seed: int, height: int = 96, width: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.8, height * 0.8])
    size = 3 + torch.rand(count, 2, generator=generator) * torch.tensor([width / 2, height / 2])
    return torch.cat([corner, corner + size], dim=1)


def plain_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def square(x: float, y: float, side: float) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def plain_atss(boxes: Tensor, anchors: Tensor, levels: list[int]) -> list[int]:
    """Algorithm 1 of arXiv 1912.02424, line by line."""
    owner, reached = [BACKGROUND] * len(anchors), [0.0] * len(anchors)
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).tolist()
    stride_of = [stride for stride, count in zip(STRIDES, levels, strict=True) for _ in range(count)]
    for g, box in enumerate(boxes.tolist()):
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates, start = [], 0
        for count in levels:
            level = sorted(range(start, start + count), key=lambda i: math.dist(centres[i], middle))
            candidates += level[:9]
            start += count
        ious = {i: plain_iou(box, square(*centres[i], 8 * stride_of[i])) for i in candidates}
        mean = sum(ious.values()) / len(ious)
        threshold = mean + math.sqrt(sum((v - mean) ** 2 for v in ious.values()) / (len(ious) - 1))
        for i, iou in ious.items():
            inside = box[0] < centres[i][0] < box[2] and box[1] < centres[i][1] < box[3]
            if iou >= threshold and inside and iou > reached[i]:
                owner[i], reached[i] = g, iou
    return owner


def plain_center(boxes: Tensor, anchors: Tensor, levels: list[int]) -> list[int]:
    """Section 3 of arXiv 2006.09214, line by line."""
    owner = []
    limits = [(0, 8 * STRIDES[0]), (4 * STRIDES[1], 8 * STRIDES[1]), (4 * STRIDES[2], math.inf)]
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).tolist()
    level_of = [level for level, count in enumerate(levels) for _ in range(count)]
    for (x, y), level in zip(centres, level_of, strict=True):
        best, smallest = BACKGROUND, math.inf
        for g, (left, top, right, bottom) in enumerate(boxes.tolist()):
            radius = 1.5 * STRIDES[level]
            near = abs(x - (left + right) / 2) < radius and abs(y - (top + bottom) / 2) < radius
            sides = (x - left, y - top, right - x, bottom - y)
            fits = limits[level][0] < max(sides) < limits[level][1]
            area = (right - left) * (bottom - top)
            if near and min(sides) > 0 and fits and area < smallest:
                best, smallest = g, area
        owner.append(best)
    return owner


@pytest.mark.parametrize("chunk", [1, 1000, 2**24])
@pytest.mark.parametrize("seed", range(5))
def test_assign_rules_equal_papers(seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "ASSIGN_CHUNK_CELLS", chunk)
    anchors, levels = grid(96, 128)
    boxes = objects(12, seed)
    assert by_atss(boxes, anchors, levels, STRIDES).tolist() == plain_atss(boxes, anchors, levels)
    assert by_center(boxes, anchors, levels, STRIDES).tolist() == plain_center(boxes, anchors, levels)


@pytest.mark.parametrize("chunk", [1, 1000, 2**24])
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.7), (0.5, 0.5)])
def test_by_iou_equals_torchvision(low: float, high: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "ASSIGN_CHUNK_CELLS", chunk)
    anchors, _ = grid(96, 128)
    boxes = torch.cat([objects(12, 7), anchors[[5, 40]], anchors[[5]]])  # also exact hits, one of two equal objects
    expected = Matcher(high, low, allow_low_quality_matches=True)(box_iou(boxes, anchors))
    found = by_iou(boxes, anchors, low, high)
    assert torch.equal(found, expected)
    assert (found == BACKGROUND).any()
    assert (found == IGNORED).any() == (low < high)


def test_assign_without_objects_gives_background() -> None:
    anchors, levels = grid(32, 32)
    none = torch.zeros(0, 4)
    for found in (
        by_iou(none, anchors, 0.3, 0.7),
        by_atss(none, anchors, levels, STRIDES),
        by_center(none, anchors, levels, STRIDES),
    ):
        assert found.tolist() == [BACKGROUND] * len(anchors)


def test_by_atss_gives_every_object_positives() -> None:
    # section 3.2 expects about a fifth of the candidates, whatever the object's size and shape
    anchors, levels = grid(96, 128)
    for seed in range(20):
        box = objects(1, seed) + torch.tensor([0, 0, 16, 16])
        count = int((by_atss(box, anchors, levels, STRIDES) == 0).sum())
        assert 1 <= count <= 9 * len(STRIDES) / 2, (box, count)


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any operator's result."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.entries = max(self.entries, *(x.numel() for x in made if isinstance(x, Tensor)), 0)
        return out


def test_assign_many_objects_bounds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "ASSIGN_CHUNK_CELLS", 2**17)
    anchors, levels = grid(400, 600)
    boxes = objects(300, 0, 400, 600)
    for rule in (
        lambda: by_atss(boxes, anchors, levels, STRIDES),
        lambda: by_center(boxes, anchors, levels, STRIDES),
        lambda: by_iou(boxes, anchors, 0.3, 0.7),
    ):
        with Largest() as largest:
            rule()
        assert largest.entries <= 2 * assign.ASSIGN_CHUNK_CELLS < len(boxes) * len(anchors) / 5
