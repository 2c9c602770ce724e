"""EfficientDet: its size is the published one, anchors and outputs correspond, losses are the formulas written out."""

import pytest
import torch
from support.baselines import CLASSES, scene, small
from torch import Tensor
from torch.nn.functional import pad
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from pipeline.config import ModelConfig
from pipeline.model import build_model
from pipeline.model.backbones.norms import FrozenBatchNorm2d
from pipeline.model.baselines.base import in_pixels, unpadded_sizes
from pipeline.model.baselines.efficientdet import STRIDES, EfficientDet

GROWN = {  # tables 1 and 2 of arXiv 1911.09070: backbone, channels, repetitions, head layers, millions of parameters
    "D0": ("efficientnet_b0", 64, 3, 3, 3.9),
    "D1": ("efficientnet_b1", 88, 4, 3, 6.6),
    "D3": ("efficientnet_b3", 160, 6, 4, 12.0),
    "D7": ("efficientnet_b6", 384, 8, 5, 52.0),
}
RELEASED = {"D0": 3_880_067, "D1": 6_625_898}  # trainable parameters of the released models


def grown(name: str) -> EfficientDet:
    backbone, width, repeats, layers, _ = GROWN[name]
    tree = {"name": "efficientdet", "num_classes": 90, "hidden_dim": width, "neck_layers": repeats}
    model = build_model(
        ModelConfig.model_validate({**tree, "head_layers": layers, "backbone": {"name": backbone, "weights": "none"}})
    )
    assert isinstance(model, EfficientDet)
    return model


@pytest.mark.parametrize("name", GROWN)
def test_efficientdet_has_published_size(name: str) -> None:
    """Within 2%; the difference is that the released BiFPN projects C4 and C5 twice and has convolutions with biases.

    The frozen batch norms' scales and shifts are buffers here and parameters there.
    """
    _, width, repeats, _, millions = GROWN[name]
    model = grown(name)
    frozen = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    count = sum(p.numel() for p in model.parameters()) + sum(2 * len(module.weight) for module in frozen)
    assert count / 1e6 == pytest.approx(millions, rel=0.02)
    if name in RELEASED:
        second = sum(channels * width + 3 * width for channels in model.backbone.channels[1:])
        biases = repeats * 8 * width  # eight nodes a repetition
        assert count + second + biases == RELEASED[name]


def test_efficientdet_initial_probabilities_are_low() -> None:
    model = small("efficientdet")
    images, mask, _, _ = scene((64, 96))
    logits, deltas, anchors = model._run(_batch(images.float(), mask))
    assert logits.shape == (2, len(anchors), CLASSES)
    assert deltas.shape == (2, len(anchors), 4)
    assert len(anchors) == sum(9 * (128 // stride) ** 2 for stride in STRIDES)
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)


@torch.no_grad()
def test_efficientdet_outputs_match_anchors() -> None:
    # a head of 1x1 convolutions alone answers at a cell with what that cell holds: here its own place in the image
    model = small("efficientdet")
    maps, head = [torch.zeros(1, 32, 128 // s, 256 // s) for s in STRIDES], model.box_head
    for x, stride in zip(maps, STRIDES, strict=True):
        x[0, 0] = torch.arange(x.shape[3]) * stride
        x[0, 1] = torch.arange(x.shape[2])[:, None] * stride
    head.convs, head.norms = torch.nn.ModuleList(), torch.nn.ModuleList()
    depthwise, pointwise = head.output
    depthwise.weight.zero_()[:, 0, 1, 1] = 1
    pointwise.weight.zero_()
    for anchor in range(9):
        pointwise.weight[4 * anchor : 4 * anchor + 2, :2, 0, 0] = torch.eye(2)
    (anchors,) = model.anchor_generator(_batch(torch.zeros(1, 3, 128, 256), torch.zeros(1, 128, 256).bool()), maps)
    assert torch.equal(head(maps, 4)[0, :, :2], (anchors[:, :2] + anchors[:, 2:]) / 2)


def test_efficientdet_losses_equal_formulas() -> None:
    model = small("efficientdet").double()
    images, mask, targets, _ = scene((64, 96))
    losses = model.train()(images, mask, targets)["losses"]
    logits, deltas, anchors = model._run(_batch(images, mask))
    focal, huber, positives = 0.0, 0.0, 0
    for image, target in enumerate(in_pixels(targets, unpadded_sizes(mask))):
        iou = box_iou(target["boxes"], anchors.double())
        best = iou.max(dim=1).values
        for a in range(len(anchors)):
            owner = int(iou[:, a].argmax())
            positive = bool(iou[owner, a] >= 0.5) or bool(((iou[:, a] == best) & (best > 0)).any())
            p = logits[image, a].sigmoid()
            wanted = torch.zeros(CLASSES).double()
            if positive:
                positives += 1
                wanted[target["labels"][owner]] = 1
                huber += _huber(deltas[image, a] - _encode(target["boxes"][owner], anchors[a].double()))
            hit = torch.where(wanted == 1, p, 1 - p)
            focal += float((torch.where(wanted == 1, 0.25, 0.75) * (1 - hit) ** 1.5 * -hit.log()).sum().detach())
    assert positives > 5
    assert losses["loss_cls"].item() == pytest.approx(focal / (positives + 1), rel=1e-6)
    assert losses["loss_bbox"].item() == pytest.approx(50 * huber / (4 * (positives + 1)), rel=1e-6)


def _batch(images: Tensor, mask: Tensor) -> ImageList:
    height, width = images.shape[-2:]
    return ImageList(pad(images, (0, -width % 128, 0, -height % 128)), unpadded_sizes(mask))


def _encode(box: Tensor, anchor: Tensor) -> Tensor:
    def parts(corners: Tensor) -> tuple[Tensor, Tensor]:
        return (corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]

    (centre, size), (at, extent) = parts(box), parts(anchor)
    return torch.cat([(centre - at) / extent, (size / extent).log()])


def _huber(error: Tensor, delta: float = 0.1) -> float:
    return sum(e * e / 2 if abs(e) <= delta else delta * (abs(e) - delta / 2) for e in error.detach().tolist())
