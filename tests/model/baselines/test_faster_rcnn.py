"""Faster R-CNN equals torchvision's in losses, gradients and detections."""

import pytest
import torch
from support.baselines import CLASSES, scene, small, torchvision_twin, with_resnet
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from pipeline.config import ModelConfig
from pipeline.model import build_model

SIZE = (64, 128)  # halved to the last level: there torchvision's strides are the true ones


def test_faster_rcnn_losses_and_gradients_equal_torchvision() -> None:
    ours = with_resnet("faster_rcnn")
    twin = torchvision_twin(fasterrcnn_resnet50_fpn, CLASSES + 1, ours, SIZE)
    images, mask, targets, shifted = scene(SIZE)
    for target in shifted:
        target["labels"] = target["labels"] + 1  # torchvision's 0 is the background
    torch.manual_seed(3)
    losses = ours.train()(images, mask, targets)["losses"]
    torch.manual_seed(3)
    expected = twin.train()(list(images), shifted)
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=1e-9)
    torch.stack(list(losses.values())).sum().backward()
    torch.stack(list(expected.values())).sum().backward()
    for key, parameter in twin.named_parameters():
        mine = ours.get_parameter(key.replace("backbone.fpn.", "fpn."))
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_faster_rcnn_detections_equal_torchvision() -> None:
    ours = with_resnet("faster_rcnn")
    twin = torchvision_twin(fasterrcnn_resnet50_fpn, CLASSES + 1, ours, SIZE)
    images, mask, _, _ = scene(SIZE)
    outputs = ours.eval()(images, mask)
    assert outputs["input_sizes"].tolist() == [list(SIZE)] * 2
    for found, expected in zip(outputs["detections"], twin.eval()(list(images)), strict=True):
        assert len(expected["scores"]) == 100  # torchvision's own limit
        torch.testing.assert_close(found["boxes_xyxy"][:100], expected["boxes"], rtol=1e-9, atol=1e-6)
        torch.testing.assert_close(found["scores"][:100], expected["scores"], rtol=1e-9, atol=1e-9)
        assert torch.equal(found["labels"][:100], expected["labels"] - 1)


def test_faster_rcnn_has_published_size() -> None:
    backbone = {"name": "resnet50", "weights": "none"}
    model = build_model(ModelConfig.model_validate({"name": "faster_rcnn", "num_classes": 90, "backbone": backbone}))
    assert sum(p.numel() for p in model.parameters()) == 41_755_286  # torchvision's published count; the paper: 42M


@pytest.mark.parametrize("height", [33, 64, 100])
@torch.no_grad()
def test_faster_rcnn_regions_are_pooled_at_true_scale(height: int) -> None:
    # torchvision takes the scales from the first batch: 33 px, padded to 64, would make stride 4 look like 2
    model = small("faster_rcnn").eval()
    model(torch.randn(1, 3, height, height), torch.zeros(1, height, height, dtype=torch.bool))
    pool = model.get_submodule("roi_heads.box_roi_pool")
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
