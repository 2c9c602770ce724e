"""Faster R-CNN with FPN (arXiv 1506.01497, 1612.03144), made of torchvision's parts with its settings.

Its weights have the names of torchvision's `fasterrcnn_resnet50_fpn`, except `fpn.`, which is `backbone.fpn.` there.
Sampling of anchors and proposals uses torch's global generator, which the engine seeds for every pad group.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline.config import ModelConfig
from pipeline.model.baselines.assign import by_iou
from pipeline.model.baselines.base import MAX_DETECTIONS, Baseline, GridAnchors, Targets, as_float32

POOLED = 7  # cells per side of a region
STRIDES = (4, 8, 16, 32, 64)
SIZES, RATIOS = ((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0)  # of anchors, in pixels and h/w


class FasterRCNN(Baseline):
    """Proposals from a pyramid of five levels, each classified and refined from its own features."""

    def __init__(self, config: ModelConfig, load_backbone: bool = True) -> None:
        """As of Baseline."""
        super().__init__(config, divisor=STRIDES[-2], load_backbone=load_backbone)
        width, hidden = config.hidden_dim, 4 * config.hidden_dim
        self.fpn = FeaturePyramidNetwork(list(self.backbone.pyramid_channels), width, LastLevelMaxPool())
        self.rpn = _RPN(
            GridAnchors(STRIDES, SIZES, RATIOS),
            _RPNHead(width, len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 2000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            _RoIAlign(["0", "1", "2", "3"], POOLED, sampling_ratio=2),
            TwoMLPHead(width * POOLED**2, hidden),
            _Predictor(hidden, config.classes + 1),  # class 0 is the background
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=MAX_DETECTIONS,
        )

    def losses(self, batch: ImageList, targets: Targets) -> dict[str, Tensor]:
        """`loss_objectness`, `loss_rpn_box_reg` of the proposals, `loss_classifier`, `loss_box_reg` of the regions."""
        shifted = [{"boxes": target["boxes"], "labels": target["labels"] + 1} for target in targets]
        _, losses = self._run(batch, shifted)
        return losses

    def detections(self, batch: ImageList) -> list[dict[str, Tensor]]:
        """As of Baseline."""
        found, _ = self._run(batch, None)
        return [{"scores": f["scores"], "labels": f["labels"] - 1, "boxes_xyxy": f["boxes"]} for f in found]

    def _run(self, batch: ImageList, targets: Targets | None) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        stages = self.backbone.pyramid(batch.tensors)
        features = self.fpn({str(level): x for level, x in enumerate(stages)})
        proposals, rpn_losses = self.rpn(batch, features, targets)
        found, roi_losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        return found, {**rpn_losses, **roi_losses}


class _RPN(RegionProposalNetwork):
    """torchvision's, with matching in bounded memory."""

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: Targets) -> tuple[list[Tensor], list[Tensor]]:
        """Per image: labels [A] (1 object, 0 background, -1 ignored) and the target box xyxy of each anchor."""
        low, high = self.proposal_matcher.low_threshold, self.proposal_matcher.high_threshold
        labels, boxes = [], []
        for grid, target in zip(anchors, targets, strict=True):
            matched = by_iou(target["boxes"], grid, low, high)
            labels.append((matched + 1).clamp(min=-1, max=1).float())  # IGNORED -2, BACKGROUND -1, objects from 0
            # without objects nothing is regressed, so any box of positive size is valid
            boxes.append(target["boxes"][matched.clamp(min=0)] if len(target["boxes"]) else grid)
        return labels, boxes


class _RPNHead(RPNHead):
    """The head with its output in float32, so that torchvision's further results are float32 too."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level objectness [N, A, H, W] and deltas [N, 4 A, H, W]."""
        objectness, deltas = super().forward(x)
        return [as_float32(o) for o in objectness], [as_float32(d) for d in deltas]


class _Predictor(FastRCNNPredictor):
    """The predictor with its output in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of each region [R, 4 width] -> logits [R, K + 1] and deltas [R, 4 (K + 1)]."""
        logits, deltas = super().forward(x)
        return as_float32(logits), as_float32(deltas)


class _RoIAlign(MultiScaleRoIAlign):
    """Takes the levels' scales from the padded image; torchvision guesses them from the first batch's un-padded one."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Any:
        """Features of each region [R, width, POOLED, POOLED]."""
        height, width = x["0"].shape[-2:]
        return super().forward(x, boxes, [(height * STRIDES[0], width * STRIDES[0])])
