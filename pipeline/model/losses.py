"""The set criterion: class, L1 and GIoU losses of matched predictions, for all layers at once.

It always runs in float32, also under autocast. The divisor is an argument, so that a step's loss does not depend on the
distribution of its pad groups over ranks. A batch without objects still gives every head a gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.ops import sigmoid_focal_loss

from pipeline.config import LossConfig
from pipeline.model.boxes import cxcywh_to_xyxy, generalized_iou
from pipeline.model.matcher import GroundTruth, HungarianMatcher, Match, Predictions

_AUX_LAYERS = 64  # number of layers in `weight_dict`; keys of layers that a model lacks are unused
_TINY = 1e-12  # a batch may have a weight of 0: no objects, and `no_object_weight` 0


class SetCriterion(nn.Module):
    """Losses as published, under the published keys, of sigmoid heads (focal loss) and softmax heads (cross entropy).

    `loss_ce`, `loss_bbox`, `loss_giou` of the last decoder layer, with suffix `_0`, `_1`, ... of the earlier ones and
    `_enc` of the two-stage encoder. `class_error` and `cardinality_error*` are only logged and have no gradient. The
    latter counts the last class as "no object", although a sigmoid head has no such class.

    Focal, L1 and GIoU are sums over objects, divided by the step's number of objects. Cross entropy is a mean over the
    queries of one batch, weighted by class. DETR averaged these means over the GPUs of a step, one batch each (DDP
    averages); here the mean is over pad groups.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.matcher = HungarianMatcher(config)
        weights = {"loss_ce": config.class_weight, "loss_bbox": config.bbox_weight, "loss_giou": config.giou_weight}
        suffixes = ("", *(f"_{layer}" for layer in range(_AUX_LAYERS)), "_enc")
        self.weight_dict = {key + suffix: weight for suffix in suffixes for key, weight in weights.items()}
        self._kept: tuple[tuple[str, ...], Tensor] | None = None

    def forward(
        self,
        outputs: Mapping[str, Any],
        targets: Sequence[dict[str, Tensor]],
        num_boxes: Tensor | float,
        groups: Tensor | float = 1.0,
    ) -> dict[str, Tensor]:
        """Compute the unweighted losses of one batch: its part of the whole step's losses.

        Args:
            outputs: of `DeformableDETR.forward` or `DETR.forward`; C logits, or C + 1 with softmax.
            targets: per image `labels` int64 [n] in 0..C-1 and `boxes` cxcywh [n, 4] relative to the un-padded image.
            num_boxes: objects of the whole optimizer step, over all its batches and ranks; at least 1 is used.
            groups: batches of the whole optimizer step, over all ranks.
        """
        device = outputs["pred_logits"].device
        with torch.autocast(device_type=device.type, enabled=False):
            truth = GroundTruth.of(targets)
            layers = [*(outputs["aux_outputs"] if self.config.aux else ()), outputs]
            stacks, truths = [_stack(layers)], [truth]
            if "enc_outputs" in outputs:
                stacks.append(_stack([outputs["enc_outputs"]]))
                truths.append(replace(truth, labels=torch.zeros_like(truth.labels)))  # class 0 stands for "object"
            matches = self.matcher(stacks, truths)
            divisor = num_boxes.clamp(min=1) if isinstance(num_boxes, Tensor) else max(num_boxes, 1.0)
            parts = [self._losses(*part, divisor, groups) for part in zip(stacks, truths, matches, strict=True)]
            suffixes = [*(f"_{layer}" for layer in range(len(layers) - 1)), ""]
            losses = {k + s: v for k, values in parts[0].items() for s, v in zip(suffixes, values, strict=True)}
            losses["class_error"] = _class_error(stacks[0], truth, matches[0])
            if len(parts) > 1:
                losses |= {f"{key}_enc": values[0] for key, values in parts[1].items()}
        return losses

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum, a scalar: the training objective."""
        names = tuple(name for name in losses if name.startswith("loss_"))
        values = torch.stack([losses[name] for name in names])
        return (values * self._weights(names, values)).sum()

    def _weights(self, names: tuple[str, ...], like: Tensor) -> Tensor:
        """The weights of these losses, copied to the device once."""
        if self._kept is None or self._kept[0] != names or self._kept[1].device != like.device:
            weights = torch.tensor([self.weight_dict[name] for name in names], dtype=like.dtype)
            self._kept = names, weights.to(like.device, non_blocking=True)
        return self._kept[1]

    def _losses(
        self,
        predictions: Predictions,
        truth: GroundTruth,
        match: Match,
        divisor: Tensor | float,
        groups: Tensor | float,
    ) -> dict[str, Tensor]:
        """Each loss as a vector [L]."""
        logits, layers = predictions.logits, predictions.logits.shape[0]
        if self.config.classification == "softmax":
            classification = self._cross_entropy(logits, truth, match) / groups
        else:
            classification = self._focal(logits, truth, match) / divisor
        matched = predictions.boxes_cxcywh[match.layers, match.images, match.queries]
        boxes = truth.boxes_cxcywh[match.objects]
        giou = generalized_iou(cxcywh_to_xyxy(matched), cxcywh_to_xyxy(boxes))
        pairs = len(matched) // layers  # the same in every layer
        with torch.no_grad():
            found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
            present = torch.tensor(truth.counts).to(found.device, non_blocking=True)
            cardinality = (found - present).abs().float().mean(1)
        return {
            "loss_ce": classification,
            "loss_bbox": (matched - boxes).abs().view(layers, pairs * 4).sum(1) / divisor,
            "loss_giou": (1 - giou).view(layers, pairs).sum(1) / divisor,
            "cardinality_error": cardinality,
        }

    def _focal(self, logits: Tensor, truth: GroundTruth, match: Match) -> Tensor:
        """The focal loss summed over images, queries and classes, [L]."""
        onehot = torch.zeros_like(logits)
        onehot[match.layers, match.images, match.queries, truth.labels[match.objects]] = 1
        return sigmoid_focal_loss(logits, onehot, self.config.focal_alpha, self.config.focal_gamma).flatten(1).sum(1)

    def _cross_entropy(self, logits: Tensor, truth: GroundTruth, match: Match) -> Tensor:
        """Cross entropy with "no object" as last class, the weighted mean over images and queries, [L]."""
        classes = logits.shape[-1]
        wanted = logits.new_full(logits.shape[:-1], classes - 1, dtype=torch.long)
        wanted[match.layers, match.images, match.queries] = truth.labels[match.objects]
        weight = logits.new_ones(classes)
        weight[-1] = self.config.no_object_weight
        entropy = cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")
        weights = weight[wanted].flatten(1).sum(1).clamp(min=_TINY)
        return entropy.view(len(logits), -1).sum(1) / weights


def _stack(layers: Sequence[Mapping[str, Tensor]]) -> Predictions:
    return Predictions(
        torch.stack([layer["pred_logits"] for layer in layers]).float(),
        torch.stack([layer["pred_boxes"] for layer in layers]).float(),
    )


@torch.no_grad()
def _class_error(predictions: Predictions, truth: GroundTruth, match: Match) -> Tensor:
    """Percentage of the last layer's matched queries whose best class is wrong; 100 without matches."""
    last = slice(len(match.objects) - len(match.objects) // len(predictions.logits), None)
    best = predictions.logits[-1, match.images[last], match.queries[last]].argmax(-1)
    right = (best == truth.labels[match.objects[last]]).float()
    return 100 - 100 * right.sum() / max(len(right), 1)
