"""FCOS (arXiv 2006.09214), made of torchvision's parts, and ATSS (arXiv 1912.02424), FCOS with another assignment.

FCOS's weights have the names of torchvision's `fcos_resnet50_fpn`, except `fpn.`, which is `backbone.fpn.` there.
"""

import torch
from torch import Tensor
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from pipeline.config import ModelConfig
from pipeline.model.baselines.assign import by_atss, by_center
from pipeline.model.baselines.base import Baseline, GridAnchors, Targets, as_float32, select_detections

STRIDES = (8, 16, 32, 64, 128)
THRESHOLD, NMS_IOU = 0.2, 0.6  # torchvision's; the threshold is of sqrt(class * centerness), so 0.04 of the product


class FCOS(Baseline):
    """A class, four distances and a centerness at every location of five levels."""

    def __init__(self, config: ModelConfig, load_backbone: bool = True) -> None:
        """As of Baseline; `config.name` (`fcos` or `atss`) selects the assignment."""
        super().__init__(config, divisor=STRIDES[2], load_backbone=load_backbone)
        width = config.hidden_dim
        self.fpn = FeaturePyramidNetwork(list(self.backbone.channels), width, LastLevelP6P7(width, width))
        self.head = FCOSHead(width, 1, config.classes, config.head_layers)
        self.anchor_generator = GridAnchors(STRIDES, [[stride] for stride in STRIDES], [1.0])
        self._assign = by_atss if config.name == "atss" else by_center

    def losses(self, batch: ImageList, targets: Targets) -> dict[str, Tensor]:
        """`loss_cls` (focal), `loss_bbox` (GIoU) and `loss_centerness`, divided by the batch's positive locations."""
        outputs, anchors, levels = self._run(batch)
        with torch.autocast(batch.tensors.device.type, enabled=False):
            matched = [self._assign(t["boxes"], anchors, levels, STRIDES) for t in targets]
            found = self.head.compute_loss(targets, outputs, [anchors] * len(targets), matched)
        return {
            "loss_cls": found["classification"],
            "loss_bbox": found["bbox_regression"],
            "loss_centerness": found["bbox_ctrness"],
        }

    def detections(self, batch: ImageList) -> list[dict[str, Tensor]]:
        """As of Baseline; a score is sqrt(class * centerness)."""
        outputs, anchors, levels = self._run(batch)
        scores = (outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()).sqrt()
        boxes = self.head.box_coder.decode(outputs["bbox_regression"], anchors.expand(len(scores), -1, -1))
        return select_detections(scores.split(levels, 1), boxes.split(levels, 1), batch.image_sizes, THRESHOLD, NMS_IOU)

    def _run(self, batch: ImageList) -> tuple[dict[str, Tensor], Tensor, list[int]]:
        """The head's outputs [N, A, ...] in float32, the anchors xyxy [A, 4], and the number of each level's."""
        maps = self.backbone(batch.tensors)
        features = list(self.fpn({str(level): x for level, x in enumerate(maps)}).values())
        outputs = {name: as_float32(value) for name, value in self.head(features).items()}
        anchors = self.anchor_generator(batch, features)[0]
        return outputs, anchors, [x.shape[-2] * x.shape[-1] for x in features]
