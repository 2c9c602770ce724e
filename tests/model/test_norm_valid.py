"""`model.norm_valid`: an image has the same result alone and in any batch, also in training."""

from typing import Any

import pytest
import torch
from support.model import VARIANTS, padded_images, random_targets, small_config, small_detr
from support.paths import ROOT
from torch import Tensor, nn

from pipeline.config import LossConfig, ModelConfig, from_dict, load_config
from pipeline.errors import ConfigError
from pipeline.model import Detector, build_criterion, build_model
from pipeline.model.backbones.norms import FrozenBatchNorm2d, GroupNorm, subsample, valid_pixels
from pipeline.model.postprocess import postprocess

CONFIGS = ROOT / "jobs" / "configs"
EIGHT = ((160, 213), (213, 160), (160, 160), (160, 200), (150, 213), (97, 131), (29, 213), (213, 33))
FOUR = ((96, 128), (80, 101), (65, 77), (128, 33))
R50 = {"name": "resnet50", "weights": "none"}
MODELS: dict[str, ModelConfig] = {
    **{name: small_config(norm_valid=True, **changes) for name, changes in VARIANTS.items()},
    "own_level": small_config(norm_valid=True, cross_level=False),
    "one_level": small_config(norm_valid=True, levels=1),
    "five_levels": small_config(norm_valid=True, levels=5),
    "detr": small_detr(norm_valid=True),
    "resnet": small_config(norm_valid=True, levels=4, backbone=R50 | {"norm": "group"}),
    "resnet_dc5": small_config(norm_valid=True, levels=4, backbone=R50 | {"norm": "group", "dilation": True}),
    "resnet_dcn": small_config(norm_valid=True, backbone=R50 | {"norm": "group", "deformable_conv": True}),
    "resnet_frozen": small_config(norm_valid=True, backbone=R50 | {"norm": "frozen_batch"}),
}


def lively(config: ModelConfig) -> Detector:
    """Random weights, with norms, biases and offsets that are not at the values they start from."""
    torch.manual_seed(0)
    model = build_model(config, load_backbone=False)
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d)) and name in ("weight", "bias"):
                nn.init.uniform_(tensor.detach(), 0.5, 1)
            elif "conv_offset" in name or not tensor.any():
                nn.init.normal_(tensor.detach(), std=0.05)
    return model


def alone(images: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each image of a batch without its padding, as a batch of its own."""
    extents = [((~m).any(1).sum(), (~m).any(0).sum()) for m in mask]
    return [(images[i : i + 1, :, :h, :w], mask[i : i + 1, :h, :w]) for i, (h, w) in enumerate(extents)]


@torch.no_grad()
def largest_difference(model: Detector, *sizes: tuple[int, int]) -> float:
    """Of scores, and of boxes relative to the image, between an image in the batch and alone."""
    batch = padded_images(*sizes)
    together = postprocess(model(*batch), torch.ones(len(sizes), 2))
    differences = [0.0]
    for found, one in zip(together, alone(*batch), strict=True):
        (expected,) = postprocess(model(*one), torch.ones(1, 2))
        differences += [float((found[key] - expected[key]).abs().max()) for key in ("scores", "boxes_xyxy")]
    return max(differences)


def test_demo_model_padded_batch_gives_same_detections() -> None:
    config = load_config(CONFIGS / "demo.yaml").model
    assert config.norm_valid
    assert largest_difference(lively(config).eval(), *EIGHT) < 1e-4
    off = config.model_copy(update={"norm_valid": False})
    assert largest_difference(lively(off).eval(), *EIGHT) > 1e-3  # what the setting is for


@pytest.mark.parametrize("name", MODELS)
def test_norm_valid_image_does_not_depend_on_batch(name: str) -> None:
    assert largest_difference(lively(MODELS[name]).eval(), *FOUR) < 1e-4


@pytest.mark.parametrize("name", ["one_stage", "two_stage", "resnet", "detr"])
def test_norm_valid_batch_has_gradients_of_its_images(name: str) -> None:
    """Losses of set prediction are sums over images, so padding must leave loss and gradient of a batch their sums."""
    model = lively(MODELS[name]).train()
    softmax = LossConfig(classification="softmax", aux=False)
    criterion = build_criterion(softmax if name == "detr" else LossConfig())
    batch, targets = padded_images(*FOUR), random_targets(3, 0, 2, 4)

    def gradient(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
        """Of the boxes alone for DETR: its class loss is a mean over the batch."""
        model.zero_grad()
        losses = criterion(model(*arguments[:2]), arguments[2], 9.0)
        loss = losses["loss_bbox"] + losses["loss_giou"] if name == "detr" else criterion.total(losses)
        loss.backward()
        return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]

    loss, gradients = gradient(*batch, targets)
    parts = [gradient(*one, [target]) for one, target in zip(alone(*batch), targets, strict=True)]
    torch.testing.assert_close(loss, sum(part for part, _ in parts), rtol=1e-4, atol=0)
    for together, *each in zip(gradients, *(g for _, g in parts), strict=True):
        scale = float(together.abs().max()) + 1e-4
        torch.testing.assert_close(together, torch.stack(each).sum(0), rtol=0, atol=5e-3 * scale)


def of_crops(norm: nn.Module, x: Tensor, valid: Tensor) -> Tensor:
    """The norm of each image without its padding, and zeros around it."""
    out = torch.zeros_like(x)
    for i, inside in enumerate(valid[:, 0].bool()):
        h, w = int(inside.any(1).sum()), int(inside.any(0).sum())
        out[i, :, :h, :w] = norm(x[i : i + 1, :, :h, :w])[0]
    return out


@pytest.mark.parametrize("norm", [GroupNorm(2, 6), FrozenBatchNorm2d(6)])
def test_norms_count_valid_pixels_only(norm: nn.Module) -> None:
    torch.manual_seed(0)
    for tensor in norm.state_dict().values():
        nn.init.uniform_(tensor, 0.5, 1)
    x = 3 + torch.randn(3, 6, 5, 7)
    valid = valid_pixels(padded_images((5, 7), (3, 2), (1, 1))[1])
    torch.testing.assert_close(norm(x, valid), of_crops(norm, x, valid), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x.bfloat16(), valid)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), norm(x.bfloat16().float(), valid), rtol=0.02, atol=0.02)


def test_group_norm_valid_gradient_is_exact() -> None:
    torch.manual_seed(0)
    norm = GroupNorm(2, 6).double()
    valid = valid_pixels(padded_images((4, 5), (2, 3))[1])
    x = torch.randn(2, 6, 4, 5, dtype=torch.double, requires_grad=True)
    inputs = (x, *(nn.init.normal_(p) for p in norm.parameters()))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, valid))
        return out

    assert torch.autograd.gradcheck(run, inputs)


def test_group_norm_group_of_one_element_works() -> None:
    """The module of torch refuses it: an image of one token and a channel in each group."""
    assert GroupNorm(4, 4).train()(torch.randn(1, 4, 1, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("stride", [2, 4, 8, 32])
def test_subsample_keeps_ceiling_of_sides(stride: int) -> None:
    sizes = ((97, 130), (64, 33), (1, 127), (32, 32))
    small = subsample(valid_pixels(padded_images(*sizes)[1]), stride)[:, 0]
    assert small.shape[1:] == (-(-97 // stride), -(-130 // stride))
    extents = [(int(v.any(1).sum()), int(v.any(0).sum())) for v in small]
    assert extents == [(-(-h // stride), -(-w // stride)) for h, w in sizes]


@pytest.mark.parametrize(
    "model",
    [
        {"neck": "fpn"},
        {"neck": "bifpn"},
        {"backbone": {"name": "efficientnet_b0"}},
        {"name": "faster_rcnn"},
        {"name": "fcos"},
        {"name": "atss"},
        {"name": "efficientdet"},
    ],
)
def test_config_norm_valid_with_other_averages_is_refused(model: dict[str, Any]) -> None:
    loss = {"classification": "own"} if "name" in model else {}
    from_dict({"model": model, "loss": loss})
    with pytest.raises(ConfigError, match="norm_valid"):
        from_dict({"model": model | {"norm_valid": True}, "loss": loss})


def test_presets_from_scratch_use_norm_valid() -> None:
    models = {path.stem: load_config(path).model for path in CONFIGS.glob("*.yaml")}
    small = {"demo", "finetune_small", "overfit"}
    assert {name for name, model in models.items() if model.norm_valid} == small
    assert {name for name, model in models.items() if model.backbone.norm == "group"} == small
