"""The base of the detectors outside the DETR family: Faster R-CNN, FCOS, ATSS and EfficientDet.

They consist of torchvision's parts. Its complete models cannot be used, because they resize, normalise and batch images
themselves. Here the loader has padded the images, and a detector pads further only to a multiple of its divisor.
Internal boxes are in pixels of the network's input; labels are 0..K-1 for callers. Coordinates, targets, losses and NMS
are float32, also under autocast. Missing targets in training are a ValueError.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, clip_boxes_to_image

from pipeline.config import ModelConfig
from pipeline.model.backbones.build import build_backbone
from pipeline.model.boxes import cxcywh_to_xyxy
from pipeline.model.detector import Detector

MAX_DETECTIONS = 1000  # that a detector returns per image; `evaluation.top_k` takes the best of them
CANDIDATES = 1000  # of each level, before NMS, as published for RetinaNet and its successors

Targets = list[dict[str, Tensor]]
LOSSES = (
    *("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"),  # Faster R-CNN
    *("loss_cls", "loss_bbox", "loss_centerness"),  # FCOS, ATSS; EfficientDet has the first two
)


class Baseline(Detector):
    """Base of these detectors: the code between a `Batch` and torchvision's parts."""

    takes_targets = True

    def __init__(self, config: ModelConfig, divisor: int, load_backbone: bool) -> None:
        """Build the common parts.

        Args:
            config: the `model` section.
            divisor: both sides are padded to a multiple of it, so that every level is half of the previous one.
            load_backbone: see `build_backbone`.

        Raises:
            ConfigError, CheckpointError: see `build_backbone`.
        """
        super().__init__(config, stride=1)  # `forward` pads, so that no image is too small
        self.divisor = divisor
        self.backbone = build_backbone(config.backbone, load_backbone)

    def forward(
        self, images: Tensor, mask: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """As Detector.forward.

        Returns:
            In training `losses`: `{"loss_...": scalar}` of this batch, each normalised over this batch.
            In evaluation `detections`: per image `scores` [k] falling, `labels` [k] and `boxes_xyxy` [k, 4] in pixels
            of the un-padded input; and `input_sizes` int64 [N, 2], its (h, w).
        """
        sizes = unpadded_sizes(mask)
        edges = [-side % self.divisor for side in images.shape[:1:-1]]
        batch = ImageList(pad(images, (0, edges[0], 0, edges[1])), sizes)
        if self.training:
            if targets is None:
                raise ValueError(f"{type(self).__name__} needs the targets in training")
            return {"losses": self.losses(batch, in_pixels(targets, sizes))}
        return {"detections": self.detections(batch), "input_sizes": torch.tensor(sizes)}

    @abstractmethod
    def losses(self, batch: ImageList, targets: Targets) -> dict[str, Tensor]:
        """Losses of a padded batch; `targets` per image: `labels` [n] and `boxes` xyxy [n, 4] in pixels."""

    @abstractmethod
    def detections(self, batch: ImageList) -> list[dict[str, Tensor]]:
        """Detections of a padded batch, see `forward`."""


class OwnLosses(nn.Module):
    """The criterion of models with their own losses (`loss.classification: own`); each has weight 1.

    A model normalises its losses over one batch (its sampled or positive anchors); the loss of an optimizer step is
    their mean over the step's batches, as DDP's average was in the published trainings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight_dict = dict.fromkeys(LOSSES, 1.0)

    def forward(
        self,
        outputs: Mapping[str, Any],
        targets: Sequence[dict[str, Tensor]],
        num_boxes: Tensor | float,
        groups: Tensor | float = 1.0,
    ) -> dict[str, Tensor]:
        """The batch's part of the step's losses. Arguments as of SetCriterion; only `groups` is used."""
        return {name: value / groups for name, value in outputs["losses"].items()}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum, a scalar: the training objective."""
        return torch.stack([self.weight_dict[name] * value for name, value in losses.items()]).sum()


class GridAnchors(AnchorGenerator):
    """Anchors centred on every cell's first pixel, at the levels' true strides and in float32.

    torchvision divides the size of the padded image by the map's, which differs from the stride where a level is
    rounded up. An image's anchors would then depend on the padding of its batch.
    """

    def __init__(self, strides: Sequence[int], sizes: Sequence[Sequence[float]], ratios: Sequence[float]) -> None:
        """Each level has a stride and sizes of its anchors; all levels have the aspect ratios h/w `ratios`."""
        super().__init__(tuple(tuple(s) for s in sizes), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """The same anchors xyxy [A, 4] for each image, level by level, row by row."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [list(x.shape[-2:]) for x in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [[stride, stride] for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


def as_float32(x: Tensor) -> Tensor:
    """Convert to float32, unless the type is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unpadded_sizes(mask: Tensor) -> list[tuple[int, int]]:
    """(h, w) of each image without its padding, from the mask [N, H, W]."""
    heights, widths = (~mask).any(2).sum(1), (~mask).any(1).sum(1)
    return [(h, w) for h, w in torch.stack([heights, widths], dim=1).tolist()]


def in_pixels(targets: Sequence[dict[str, Tensor]], sizes: Sequence[tuple[int, int]]) -> Targets:
    """Convert the loader's targets to boxes xyxy in pixels; boxes without area in float32 are dropped."""
    found = []
    for target, (height, width) in zip(targets, sizes, strict=True):
        boxes = as_float32(target["boxes"])
        boxes = cxcywh_to_xyxy(boxes) * boxes.new_tensor([width, height] * 2)
        real = (boxes[:, 2:] > boxes[:, :2]).all(1)
        found.append({"boxes": boxes[real], "labels": target["labels"][real]})
    return found


def select_detections(
    scores: Sequence[Tensor],
    boxes_xyxy: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    threshold: float,
    nms_iou: float,
) -> list[dict[str, Tensor]]:
    """Select each image's detections: the best (location, class) pairs of each level, then NMS for each class.

    Args:
        scores: per level [N, A, K].
        boxes_xyxy: per level [N, A, 4] in pixels.
        sizes: (h, w) of each image, to which boxes are clipped.
        threshold: lower scores are dropped.
        nms_iou: of two boxes of a class with a higher IoU, the one with the lower score is dropped.
    """
    found = []
    for image, size in enumerate(sizes):
        parts = [_candidates(s[image], b[image], threshold) for s, b in zip(scores, boxes_xyxy, strict=True)]
        best, labels, boxes = (torch.cat(column) for column in zip(*parts, strict=True))
        boxes = clip_boxes_to_image(boxes, size)
        kept = batched_nms(boxes, best, labels, nms_iou)[:MAX_DETECTIONS]
        found.append({"scores": best[kept], "labels": labels[kept], "boxes_xyxy": boxes[kept]})
    return found


def _candidates(scores: Tensor, boxes_xyxy: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels and boxes of a level's best pairs."""
    classes = scores.shape[1]
    flat = scores.flatten()
    above = torch.where(flat > threshold)[0]
    best, order = flat[above].topk(min(CANDIDATES, len(above)))
    pairs = above[order]
    return best, pairs % classes, boxes_xyxy[pairs // classes]
