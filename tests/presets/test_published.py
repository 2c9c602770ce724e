"""Presets against an independent model over published checkpoints; that model against the authors' recorded outputs."""

import pytest
import torch
from support import golden_recipe
from support.paths import ROOT
from support.published import Published, Variant, shapes

from pipeline.config import load_config
from pipeline.model import build_model
from pipeline.model.weights.published import export_official, load_official, official_names

PRESETS = ROOT / "jobs" / "configs"
VARIANTS = {
    "r50_deformable": Variant(),
    "r50_deformable_single_scale": Variant(levels=1),
    "r50_deformable_single_scale_k1": Variant(levels=1, points=1),
    "r50_deformable_single_scale_dc5": Variant(levels=1, dilation=True),
    "r50_deformable_k1": Variant(points=1),
    "r101_deformable": Variant(network="resnet101"),
}


def reference(variant: Variant) -> Published:
    """With a leaf for every tensor that trains, shared by its aliases."""
    meta = golden_recipe.load("ms")[0]
    checkpoint = golden_recipe.checkpoint({"keys": shapes(variant), "alias": meta["alias"]})
    owned = {key: tensor for key, tensor in checkpoint.items() if key not in meta["alias"]}
    for key, tensor in owned.items():
        tensor.requires_grad_(".bn" not in key and "downsample.1" not in key)
    return Published(variant, {key: owned[meta["alias"].get(key, key)] for key in checkpoint})


@torch.no_grad()
def test_reference_model_gives_the_recorded_outputs() -> None:
    arrays = golden_recipe.load("ms")[1]
    logits, boxes = reference(Variant())(*golden_recipe.batch())
    torch.testing.assert_close(logits, torch.from_numpy(arrays["logits"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(boxes, torch.from_numpy(arrays["boxes"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", VARIANTS)
def test_presets_have_the_recorded_outputs_and_gradients(preset: str) -> None:
    plain = reference(VARIANTS[preset])
    settings = {"model.num_classes": 91, "model.dropout": 0.0, "model.backbone.weights": "none"}
    model = build_model(load_config(PRESETS / f"{preset}.yaml", settings).model).eval()
    load_official(model, plain.tensors)
    assert export_official(model).keys() == plain.tensors.keys()
    images, mask = (x[..., :160, :256] for x in golden_recipe.batch())
    mask[1, :, 200:] = True
    images[1, :, :, 200:] = 0
    outputs = model(images, mask)
    logits, boxes = plain(images, mask)
    torch.testing.assert_close(outputs["pred_logits"], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs["pred_boxes"], boxes, rtol=1e-4, atol=1e-5)
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(logits.shape, generator=draw), torch.randn(boxes.shape, generator=draw)
    for one in (outputs["pred_logits"], outputs["pred_boxes"]), (logits, boxes):
        sum((w * x).sum() for w, x in zip(weights, one, strict=True)).backward()
    names = official_names(model)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            expected = plain.tensors[names[key][0]].grad
            assert expected is not None
            # rounding takes a hidden unit over the kink of its ReLU now and then: that is 1e-3 of a gradient
            assert (parameter.grad - expected).norm() <= 1e-2 * expected.norm(), key
