"""FCOS equals torchvision's in losses, gradients and detections. ATSS differs only by its assignment."""

import torch
from support.baselines import CLASSES, scene, small, torchvision_twin, with_resnet
from torchvision.models.detection import fcos_resnet50_fpn

from pipeline.config import ModelConfig
from pipeline.model import build_model

SIZE = (128, 256)  # halved to the last level: there torchvision's strides are the true ones
NAMES = {"loss_cls": "classification", "loss_bbox": "bbox_regression", "loss_centerness": "bbox_ctrness"}


def test_fcos_losses_and_gradients_equal_torchvision() -> None:
    ours = with_resnet("fcos")
    twin = torchvision_twin(fcos_resnet50_fpn, CLASSES, ours, SIZE)
    images, mask, targets, pixels = scene(SIZE)
    losses = ours.train()(images, mask, targets)["losses"]
    expected = twin.train()(list(images), pixels)
    assert {NAMES[name] for name in losses} == set(expected)
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[NAMES[name]], rtol=1e-9, atol=1e-9)
    torch.stack(list(losses.values())).sum().backward()
    torch.stack(list(expected.values())).sum().backward()
    for key, parameter in twin.named_parameters():
        mine = ours.get_parameter(key.replace("backbone.fpn.", "fpn."))
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_fcos_detections_equal_torchvision() -> None:
    ours = with_resnet("fcos")
    twin = torchvision_twin(fcos_resnet50_fpn, CLASSES, ours, SIZE)
    for model in (ours, twin):
        torch.manual_seed(1)
        model.get_parameter("head.classification_head.cls_logits.bias").normal_(0)  # above the threshold of scores
        model.get_parameter("head.classification_head.cls_logits.weight").normal_(0, 0.1)
        model.get_parameter("head.regression_head.bbox_reg.bias").fill_(3.0)
    images, mask, _, _ = scene(SIZE)
    outputs = ours.eval()(images, mask)
    for found, expected in zip(outputs["detections"], twin.eval()(list(images)), strict=True):
        assert len(expected["scores"]) == 100  # torchvision's own limit
        torch.testing.assert_close(found["boxes_xyxy"][:100], expected["boxes"], rtol=1e-9, atol=1e-6)
        torch.testing.assert_close(found["scores"][:100], expected["scores"], rtol=1e-9, atol=1e-9)
        assert torch.equal(found["labels"][:100], expected["labels"])


def test_fcos_parameters_equal_torchvision() -> None:
    backbone = {"name": "resnet50", "weights": "none"}
    model = build_model(ModelConfig.model_validate({"name": "fcos", "num_classes": 91, "backbone": backbone}))
    assert sum(p.numel() for p in model.parameters()) == 32_269_600  # torchvision's published count


def test_atss_network_equals_fcos() -> None:
    images, mask, targets, _ = scene((64, 96))
    fcos, atss = small("fcos").double(), small("atss").double()
    assert all(torch.equal(a, b) for a, b in zip(fcos.parameters(), atss.parameters(), strict=True))
    first, second = (model(images, mask, targets)["losses"] for model in (fcos, atss))
    assert not torch.allclose(first["loss_cls"], second["loss_cls"], rtol=1e-3)
    with torch.no_grad():
        found, same = (model.eval()(images, mask)["detections"] for model in (fcos, atss))
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(found, same, strict=True))
