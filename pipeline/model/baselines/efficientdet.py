"""EfficientDet (arXiv 1911.09070): a BiFPN over five levels and two heads of depthwise separable convolutions.

It works with any backbone; the paper scales an EfficientNet together with `hidden_dim`, `neck_layers` and
`head_layers` (D0: B0, 64, 3, 3; D7: B6, 384, 8, 5). Losses and matching follow the released code where the paper does
not define them. The norms of neck and heads are group norms (see `norms`).
"""

from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss, max_pool2d, one_hot, silu
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import sigmoid_focal_loss

from pipeline.config import ModelConfig
from pipeline.model.backbones.norms import group_norm
from pipeline.model.baselines.assign import BACKGROUND, by_iou
from pipeline.model.baselines.base import Baseline, GridAnchors, Targets, as_float32, select_detections
from pipeline.model.necks import BiFPN

STRIDES = (8, 16, 32, 64, 128)
SCALE, OCTAVES, RATIOS = 4, (1.0, 2 ** (1 / 3), 2 ** (2 / 3)), (0.5, 1.0, 2.0)  # of anchors: strides, sizes, h/w
IOU = 0.5  # at least this for an object's anchors; others are background
ALPHA, GAMMA = 0.25, 1.5  # focal loss, section 5.1
HUBER, BOX_WEIGHT = 0.1, 50.0
THRESHOLD, NMS_IOU = 0.01, 0.5
PRIOR = 0.01  # initial probability of every class


class EfficientDet(Baseline):
    """A class and a box at each of nine anchors of every location of five levels."""

    def __init__(self, config: ModelConfig, load_backbone: bool = True) -> None:
        """As of Baseline."""
        super().__init__(config, divisor=STRIDES[-1], load_backbone=load_backbone)
        width, anchors = config.hidden_dim, len(OCTAVES) * len(RATIOS)
        channels = self.backbone.channels
        self.lateral = nn.ModuleList(_lateral(c, width) for c in (*channels, channels[-1]))
        self.neck = BiFPN(width, len(STRIDES), config.neck_layers)
        self.class_head = _Head(width, config.head_layers, anchors * config.classes)
        self.box_head = _Head(width, config.head_layers, anchors * 4)
        nn.init.constant_(self.class_head.get_parameter("output.1.bias"), -log((1 - PRIOR) / PRIOR))
        sizes = [[SCALE * stride * octave for octave in OCTAVES] for stride in STRIDES]
        self.anchor_generator = GridAnchors(STRIDES, sizes, RATIOS)
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def losses(self, batch: ImageList, targets: Targets) -> dict[str, Tensor]:
        """`loss_cls` (focal) and `loss_bbox` (Huber, weighted), divided by the batch's positive anchors plus one."""
        logits, deltas, anchors = self._run(batch)
        with torch.autocast(batch.tensors.device.type, enabled=False):
            matched = [by_iou(target["boxes"], anchors, IOU, IOU) for target in targets]
            wanted = torch.zeros_like(logits)
            deviation = deltas.sum() * 0  # the box head needs a gradient also without objects
            for row, (match, target) in enumerate(zip(matched, targets, strict=True)):
                positive = torch.where(match > BACKGROUND)[0]
                objects = match[positive]
                wanted[row, positive] = one_hot(target["labels"][objects], logits.shape[2]).to(wanted)
                goal = self.box_coder.encode_single(target["boxes"][objects], anchors[positive])
                deviation = deviation + huber_loss(deltas[row, positive], goal, reduction="sum", delta=HUBER)
            positives = torch.stack([(match > BACKGROUND).sum() for match in matched]).sum() + 1
            focal = sigmoid_focal_loss(logits, wanted, ALPHA, GAMMA, reduction="sum")
            return {"loss_cls": focal / positives, "loss_bbox": BOX_WEIGHT * deviation / (4 * positives)}

    def detections(self, batch: ImageList) -> list[dict[str, Tensor]]:
        """As of Baseline."""
        logits, deltas, anchors = self._run(batch)
        images, count, _ = logits.shape
        boxes = self.box_coder.decode_single(deltas.flatten(0, 1), anchors.repeat(images, 1)).view(images, count, 4)
        levels = [3 * 3 * (batch.tensors.shape[-2] // s) * (batch.tensors.shape[-1] // s) for s in STRIDES]
        return select_detections(
            logits.sigmoid().split(levels, 1), boxes.split(levels, 1), batch.image_sizes, THRESHOLD, NMS_IOU
        )

    def _run(self, batch: ImageList) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, A, K] and deltas [N, A, 4] in float32, and the anchors xyxy [A, 4]."""
        maps = self.backbone(batch.tensors)
        levels = [lateral(x) for lateral, x in zip(self.lateral, (*maps, maps[-1]), strict=True)]
        levels[3] = max_pool2d(levels[3], kernel_size=3, stride=2, padding=1)
        levels.append(max_pool2d(levels[3], kernel_size=3, stride=2, padding=1))
        levels = self.neck(levels)
        anchors = self.anchor_generator(batch, levels)[0]
        return self.class_head(levels, self.config.classes), self.box_head(levels, 4), anchors


class _Head(nn.Module):
    """Separable convolutions shared by all levels; each level has its own norms, as published."""

    def __init__(self, width: int, layers: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_separable(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.ModuleList(group_norm(width) for _ in STRIDES) for _ in range(layers))
        self.output = _separable(width, outputs)

    def forward(self, levels: list[Tensor], values: int) -> Tensor:
        """Maps [N, width, H, W] of each level -> float32 [N, A, values], as GridAnchors orders anchors."""
        found = []
        for level, x in enumerate(levels):
            for conv, norms in zip(self.convs, self.norms, strict=True):
                x = silu(_at(norms, level)(conv(x)))
            out = self.output(x)
            found.append(out.permute(0, 2, 3, 1).reshape(len(out), -1, values))
        return as_float32(torch.cat(found, dim=1))


def _at(modules: Any, index: int) -> nn.Module:
    module: nn.Module = modules[index]
    return module


def _separable(before: int, after: int) -> nn.Sequential:
    depthwise = nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False)
    pointwise = nn.Conv2d(before, after, 1)
    nn.init.zeros_(pointwise.bias)  # type: ignore[arg-type]  # Conv2d.bias is typed optional; this one exists
    return nn.Sequential(depthwise, pointwise)


def _lateral(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 1), group_norm(after))
