"""DETR as a whole: parameters, initialisation, outputs, padding, precision, gradients, errors, presets."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.host_syncs import RefuseHostSyncs
from support.model import padded_images, random_targets, small_detr
from support.paths import ROOT

from pipeline.config import Config, LossConfig, ModelConfig, flatten, load_config
from pipeline.engine.optim import parameter_groups
from pipeline.errors import ConfigError
from pipeline.model import DETR, build_criterion, build_model
from pipeline.presets.published import find_published

PRESETS = ROOT / "jobs" / "configs"
BATCH = padded_images((96, 128), (80, 100))
HEADS = {"softmax": {}, "sigmoid": {"class_head": "sigmoid"}}
LOSSES = {
    "softmax": LossConfig(classification="softmax", class_weight=1, class_cost=1),
    "sigmoid": LossConfig(classification="focal"),
}


@pytest.fixture(scope="module", params=HEADS)
def model(request: pytest.FixtureRequest) -> DETR:
    torch.manual_seed(0)
    return build_model(small_detr(**HEADS[request.param]))


@pytest.fixture(scope="module", params=["r50_detr_dc5", "r50_detr_dc5_plus"])
def full(request: pytest.FixtureRequest) -> DETR:
    """A preset with the classes of the published weights."""
    config = load_config(PRESETS / f"{request.param}.yaml", {"model.num_classes": 91, "data.labels": "raw"})
    return build_model(config.model, load_backbone=False)


def test_detr_has_published_size(full: DETR) -> None:
    plus = full.config.class_head == "sigmoid"
    trainable = sum(p.numel() for p in full.parameters() if p.requires_grad)
    assert trainable == (41_353_311 if plus else 41_302_368)
    assert full.class_embed.out_features == (91 if plus else 92)
    assert full.query_embed.weight.shape == (300 if plus else 100, 256)


def test_detr_initialisation_is_published(full: DETR) -> None:
    """Xavier in the transformer, torch's own elsewhere: no zeroed box head, and a prior for the focal loss only."""
    bound = 1 / math.sqrt(256)  # of a linear layer's own initialisation
    if full.config.class_head == "sigmoid":
        torch.testing.assert_close(full.class_embed.bias.detach(), torch.full((91,), -math.log(99)))
    else:
        assert 0 < full.class_embed.bias.abs().max() <= bound
    for layer in full.bbox_embed.layers:
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert 0 < layer.bias.abs().max() <= bound
    assert 0.95 < full.query_embed.weight.std() < 1.05
    assert 0 < full.input_proj.bias.abs().max() <= 1 / math.sqrt(2048)
    assert full.transformer.encoder.layers[0].linear1.weight.abs().max() <= math.sqrt(6 / (256 + 2048))


def test_detr_learning_rate_groups_match_tensors(full: DETR) -> None:
    groups = {
        group["name"]: group["params"] for group in parameter_groups(full, load_config(PRESETS / "r50_detr.yaml").optim)
    }
    assert list(groups) == ["main", "backbone"]  # the projection group has nothing to hold, and is left out
    assert len(groups["backbone"]) == 42


def test_detr_dc5_has_four_times_the_pixels(full: DETR) -> None:
    assert full.stride == 16
    seen: list[int] = []
    hook = full.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    with torch.no_grad():
        full(torch.zeros(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    hook.remove()
    assert seen == [(4, 6)]


def test_detr_outputs_have_documented_shapes(model: DETR) -> None:
    outputs = model(*BATCH)
    layers = [outputs, *outputs["aux_outputs"]]
    assert len(layers) == model.config.dec_layers
    softmax = model.config.class_head == "softmax"
    for layer in layers:
        assert layer["pred_logits"].shape == (2, 12, 5 + softmax)
        assert layer["pred_boxes"].shape == (2, 12, 4)
        assert ((layer["pred_boxes"] > 0) & (layer["pred_boxes"] < 1)).all()
    assert outputs.get("softmax", False) is softmax
    assert "enc_outputs" not in outputs


def test_detr_every_tensor_has_one_name(model: DETR) -> None:
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_detr_without_objects_every_parameter_has_gradient(model: DETR, counts: tuple[int, ...]) -> None:
    model.zero_grad()
    criterion = build_criterion(LOSSES[model.config.class_head])
    criterion.total(criterion(model(*BATCH), random_targets(*counts), 5.0)).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_detr_autocast_keeps_outputs_and_losses_float32(model: DETR) -> None:
    model.eval()
    criterion = build_criterion(LOSSES[model.config.class_head])
    with torch.no_grad():
        exact = model(*BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(*BATCH)
            losses = criterion(half, random_targets(3, 2), 5.0)
    assert half["pred_boxes"].dtype == half["pred_logits"].dtype == torch.float32
    assert {value.dtype for value in losses.values()} == {torch.float32}
    torch.testing.assert_close(half["pred_boxes"], exact["pred_boxes"], rtol=0, atol=0.05)


def test_detr_bf16_step_gives_finite_gradients(model: DETR) -> None:
    model.zero_grad()
    criterion = build_criterion(LOSSES[model.config.class_head])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(*BATCH)
    criterion.total(criterion(outputs, random_targets(3, 2), 5.0)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_detr_forward_does_not_synchronise(model: DETR) -> None:
    with RefuseHostSyncs():
        model(*BATCH)


def test_detr_image_does_not_depend_on_batch(model: DETR) -> None:
    """At the same padded size; group norm of Conv5 sees one image at a time."""
    model.eval()
    images, mask = BATCH
    with torch.no_grad():
        together, alone = model(images, mask), model(images[1:], mask[1:])
    torch.testing.assert_close(together["pred_boxes"][1:], alone["pred_boxes"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together["pred_logits"][1:], alone["pred_logits"], rtol=1e-4, atol=1e-4)


def test_detr_padding_changes_nothing() -> None:
    """Padding is masked: with a backbone of 1x1 kernels, more padding does not change an image's result."""
    torch.manual_seed(0)
    model = build_model(small_detr()).eval()
    model.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 32, stride=32), _AsList())
    images, mask = padded_images((96, 128))
    wide, wide_mask = torch.zeros(1, 3, 160, 192), torch.ones(1, 160, 192, dtype=torch.bool)
    wide[:, :, :96, :128], wide_mask[:, :96, :128] = images, False
    with torch.no_grad():
        torch.testing.assert_close(model(wide, wide_mask)["pred_boxes"], model(images, mask)["pred_boxes"])


class _AsList(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


def test_detr_checkpoint_encoder_gives_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model(small_detr(checkpoint_encoder=recompute, dropout=0.2))
        torch.manual_seed(1)  # dropout repeats in the recomputation
        model(*BATCH)["pred_boxes"].square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_detr_dropout_acts_in_training_only() -> None:
    model = build_model(small_detr(dropout=0.3))
    assert not torch.equal(model(*BATCH)["pred_logits"], model(*BATCH)["pred_logits"])
    model.eval()
    assert torch.equal(model(*BATCH)["pred_logits"], model(*BATCH)["pred_logits"])


@torch.no_grad()
def test_detr_small_image_is_padded_to_stride() -> None:
    model = build_model(small_detr()).eval()
    images, mask = padded_images((31, 200))
    padded, its_mask = torch.zeros(1, 3, 32, 200), torch.zeros(1, 32, 200, dtype=torch.bool)
    padded[:, :, :31], its_mask[:, 31:] = images, True
    assert torch.equal(model(images, mask)["pred_boxes"], model(padded, its_mask)["pred_boxes"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("two_stage", True),
        ("refine", True),
        ("levels", 3),
        ("enc_points", 1),
        ("dec_points", 1),
        ("cross_level", False),
        ("neck", "fpn"),
        ("op", "torch"),
    ],
)
def test_config_detr_with_deformable_setting_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=rf"{field} .*model\.name=detr"):
        ModelConfig(name="detr", **{field: value})


def test_config_softmax_without_detr_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"class_head: softmax .*model\.name=detr"):
        ModelConfig(class_head="softmax")


@pytest.mark.parametrize(("head", "loss"), [("softmax", "focal"), ("sigmoid", "softmax"), ("softmax", "own")])
def test_config_head_and_loss_must_agree(tmp_path: Path, head: str, loss: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{name: detr, class_head: {head}}}\nloss: {{classification: {loss}}}")
    wanted = "softmax" if head == "softmax" else "focal"
    with pytest.raises(ConfigError, match=rf"class_head={head} .*loss\.classification={wanted}"):
        load_config(path)


DC5 = {"model.backbone.dilation": True, "train.micro_batch": 1}
SHORT = {"train.epochs": 50, "optim.drop_epochs": (40,)}
PLUS = {"model.class_head": "sigmoid", "model.queries": 300, "loss.classification": "focal"}


@pytest.mark.parametrize(
    ("preset", "changed"),
    [
        ("r50_detr", {}),
        ("r50_detr_dc5", DC5),
        ("r50_detr_dc5_50ep", DC5 | SHORT),
        ("r50_detr_dc5_plus", DC5 | SHORT | PLUS | {"loss.class_weight": 2.0, "loss.class_cost": 2.0}),
    ],
)
def test_presets_of_detr_are_published_recipe(preset: str, changed: dict[str, Any]) -> None:
    """Only the documented differences from Deformable DETR's recipe."""
    recipe = {
        "model.name": "detr",
        "model.class_head": "softmax",
        "model.ffn_dim": 2048,
        "model.queries": 100,
        "loss.classification": "softmax",
        "loss.class_weight": 1.0,
        "loss.class_cost": 1.0,
        "optim.lr": 1e-4,
        "optim.backbone_lr": 1e-5,
        "optim.drop_epochs": (400,),
        "train.epochs": 500,
        "train.global_batch": 64,
    }
    config = load_config(PRESETS / f"{preset}.yaml")
    row = find_published(preset)
    assert flatten(config) == flatten(Config()) | {"name": preset} | recipe | changed
    assert (row.table, row.epochs) == ("1", config.train.epochs)
    first = (PRESETS / f"{preset}.yaml").read_text().splitlines()[0]
    assert f"AP {row.ap} after {row.epochs} epochs" in first
