"""The criterion against a plain per-layer computation; accumulation, empty images, keys and precision."""

from typing import Any

import pytest
import torch
from support.model import random_outputs, random_targets
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, l1_loss, one_hot

from pipeline.config import LossConfig
from pipeline.model import build_criterion
from pipeline.model.boxes import cxcywh_to_xyxy, generalized_iou
from pipeline.model.losses import SetCriterion
from pipeline.model.matcher import GroundTruth, Predictions

CRITERION = build_criterion(LossConfig())
SOFTMAX = build_criterion(LossConfig(classification="softmax", class_weight=1, class_cost=1, no_object_weight=0.1))


def leaves(outputs: dict[str, Any]) -> list[Tensor]:
    layers = [outputs, *outputs["aux_outputs"], *([outputs["enc_outputs"]] if "enc_outputs" in outputs else [])]
    return [layer[key] for layer in layers for key in ("pred_logits", "pred_boxes")]


def plain(layer: dict[str, Tensor], targets: list[dict[str, Tensor]], num_boxes: float) -> dict[str, Tensor]:
    """One layer, image after image, formulas spelled out."""
    focal, l1, giou = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)
    for image, target in enumerate(targets):
        logits, boxes = layer["pred_logits"][image], layer["pred_boxes"][image]
        one = Predictions(logits[None, None].detach(), boxes[None, None].detach())
        (match,) = CRITERION.matcher([one], [GroundTruth.of([target])])
        wanted = torch.zeros_like(logits)
        wanted[match.queries] = one_hot(target["labels"][match.objects], logits.shape[1]).float()
        p = logits.sigmoid()
        right = torch.where(wanted > 0, p, 1 - p)
        alpha = torch.where(wanted > 0, 0.25, 0.75)
        entropy = binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        focal = focal + (alpha * (1 - right) ** 2 * entropy).sum()
        found, objects = boxes[match.queries], target["boxes"][match.objects]
        l1 = l1 + l1_loss(found, objects, reduction="sum")
        giou = giou + (1 - generalized_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(objects))).sum()
    return {"loss_ce": focal / num_boxes, "loss_bbox": l1 / num_boxes, "loss_giou": giou / num_boxes}


def test_criterion_every_layer_equals_plain_computation() -> None:
    outputs, targets = random_outputs(3, 7, enc=20), random_targets(2, 0, 4)
    losses = CRITERION(outputs, targets, 6.0)
    as_objects = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    expected = {f"{k}_enc": v for k, v in plain(outputs["enc_outputs"], as_objects, 6.0).items()}
    for suffix, layer in {"_0": outputs["aux_outputs"][0], "_1": outputs["aux_outputs"][1], "": outputs}.items():
        expected |= {k + suffix: v for k, v in plain(layer, targets, 6.0).items()}
    assert {k for k in losses if k.startswith("loss_")} == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_total_uses_configured_weights() -> None:
    criterion = SetCriterion(LossConfig(class_weight=1, bbox_weight=3, giou_weight=0.5))
    losses = criterion(random_outputs(1, 4, enc=9), random_targets(2), 2.0)
    weights = {"ce": 1, "bbox": 3, "giou": 0.5}
    expected = sum(weights[k.split("_")[1]] * v for k, v in losses.items() if k.startswith("loss_"))
    torch.testing.assert_close(criterion.total(losses), expected)
    assert criterion.weight_dict["loss_bbox_4"] == criterion.weight_dict["loss_bbox_enc"] == 3
    assert not any(key.startswith(("class", "card")) for key in criterion.weight_dict)


def test_criterion_groups_sum_to_step() -> None:
    """Losses and gradients of a batch split into micro-batches, each divided by the step's number of objects."""
    outputs, targets = random_outputs(4, 6, enc=15), random_targets(3, 0, 1, 5)
    whole = CRITERION.total(CRITERION(outputs, targets, torch.tensor(9.0)))
    grads = torch.autograd.grad(whole, leaves(outputs))
    parts = []
    for images in (slice(0, 1), slice(1, 2), slice(2, 4)):
        layers = [{k: layer[k][images] for k in ("pred_logits", "pred_boxes")} for layer in outputs["aux_outputs"]]
        part = {k: outputs[k][images] for k in ("pred_logits", "pred_boxes")} | {"aux_outputs": layers}
        part["enc_outputs"] = {k: v[images] for k, v in outputs["enc_outputs"].items()}
        parts.append(CRITERION.total(CRITERION(part, targets[images], torch.tensor(9.0))))
    summed = torch.stack(parts).sum()
    torch.testing.assert_close(summed, whole)
    for a, b in zip(torch.autograd.grad(summed, leaves(outputs)), grads, strict=True):
        torch.testing.assert_close(a, b)


def published_cross_entropy(layer: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """DETR's class loss of one batch: the mean that PyTorch takes over weighted classes, 5 and "no object"."""
    predictions = Predictions(layer["pred_logits"][None].detach(), layer["pred_boxes"][None].detach())
    truth = GroundTruth.of(targets)
    (match,) = SOFTMAX.matcher([predictions], [truth])
    wanted = torch.full(layer["pred_logits"].shape[:2], 5)
    wanted[match.images, match.queries] = truth.labels[match.objects]
    weight = torch.tensor([1.0, 1, 1, 1, 1, 0.1])
    return cross_entropy(layer["pred_logits"].transpose(1, 2), wanted, weight)


@pytest.mark.parametrize("counts", [(2, 0, 4), (0, 0, 0)])
def test_cross_entropy_one_group_is_published(counts: tuple[int, ...]) -> None:
    outputs, targets = random_outputs(3, 7, classes=6), random_targets(*counts)
    losses = SOFTMAX(outputs, targets, 6.0)
    for suffix, layer in {"_0": outputs["aux_outputs"][0], "_1": outputs["aux_outputs"][1], "": outputs}.items():
        torch.testing.assert_close(losses[f"loss_ce{suffix}"], published_cross_entropy(layer, targets))
    half = SOFTMAX(outputs, targets, 6.0, groups=torch.tensor(2.0))
    torch.testing.assert_close(half["loss_ce"], losses["loss_ce"] / 2)
    torch.testing.assert_close(half["loss_bbox"], losses["loss_bbox"])
    grads = torch.autograd.grad(SOFTMAX.total(losses), leaves(outputs))
    assert all(g.isfinite().all() for g in grads)


def test_cross_entropy_step_is_mean_over_groups() -> None:
    """As published over GPUs: the plain mean of each group's weighted mean, whatever the groups weigh."""
    sizes = ((3, 1), (0, 0), (5, 2))
    outputs = [random_outputs(2, 7, classes=6, seed=seed) for seed in range(3)]
    targets = [random_targets(*counts) for counts in sizes]
    parts = [SOFTMAX(o, t, 11.0, 3.0)["loss_ce"] for o, t in zip(outputs, targets, strict=True)]
    means = [published_cross_entropy(o, t) for o, t in zip(outputs, targets, strict=True)]
    torch.testing.assert_close(torch.stack(parts).sum(), torch.stack(means).mean())


def test_cross_entropy_zero_weight_is_zero() -> None:
    criterion = SetCriterion(LossConfig(classification="softmax", no_object_weight=0))
    outputs = random_outputs(1, 4, classes=6)
    losses = criterion(outputs, random_targets(0), 1.0)
    assert losses["loss_ce"] == 0
    assert all(not g.any() for g in torch.autograd.grad(criterion.total(losses), leaves(outputs)))


def test_criterion_logged_errors_softmax() -> None:
    targets = [{"labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2]])}]
    boxes = torch.cat([targets[0]["boxes"], torch.tensor([[0.5, 0.5, 0.9, 0.9]])])[None]
    logits = torch.tensor([[[-5.0, 5, -5, -5], [-5.0, -5, -5, 5], [-5.0, -5, -5, 5]]])  # the last is "no object"
    losses = SOFTMAX({"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": []}, targets, 2.0)
    assert losses["class_error"] == 50  # the second query matches but says that there is nothing
    assert losses["cardinality_error"] == 1  # one object found of two


@pytest.mark.parametrize("counts", [(0, 0), (0, 3)])
def test_criterion_without_objects_every_output_has_gradient(counts: tuple[int, ...]) -> None:
    outputs = random_outputs(2, 5, enc=9)
    losses = CRITERION(outputs, random_targets(*counts), torch.tensor(0.0))
    grads = torch.autograd.grad(CRITERION.total(losses), leaves(outputs))  # raises for an output that is not reached
    assert all(g.isfinite().all() for g in grads)
    assert all(v.isfinite() for v in losses.values())
    if not any(counts):
        assert losses["loss_bbox"] == losses["loss_giou_0"] == 0
        assert losses["class_error"] == 100


@pytest.mark.parametrize("num_boxes", [0.0, torch.tensor(0.0), 1, torch.tensor(1)])
def test_criterion_divisor_is_at_least_one(num_boxes: Tensor | float) -> None:
    outputs, targets = random_outputs(1, 5), random_targets(1)
    expected = CRITERION(outputs, targets, 1.0)["loss_ce"]
    torch.testing.assert_close(CRITERION(outputs, targets, num_boxes)["loss_ce"], expected)


def test_criterion_without_aux_uses_last_layer_and_encoder() -> None:
    losses = SetCriterion(LossConfig(aux=False))(random_outputs(1, 5, enc=9), random_targets(2), 2.0)
    names = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
    assert set(losses) == {*names, "class_error", *(f"{name}_enc" for name in names)}


def test_criterion_logged_errors_by_hand() -> None:
    targets = [{"labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2]])}]
    boxes = torch.cat([targets[0]["boxes"], torch.tensor([[0.5, 0.5, 0.9, 0.9]])])[None]
    logits = torch.tensor([[[-5.0, 5, -5, -5], [5.0, -5, -5, -5], [-5.0, -5, -5, 5]]])
    losses = CRITERION({"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": []}, targets, 2.0)
    assert losses["class_error"] == 50  # of the two matched queries one is right
    assert losses["cardinality_error"] == 0  # the third prefers the last class, which counts as "no object"
    assert losses["loss_bbox"] == 0
    assert losses["loss_giou"].item() == pytest.approx(0, abs=1e-6)


def test_criterion_autocast_stays_float32() -> None:
    outputs, targets = random_outputs(2, 6), random_targets(2, 1)
    exact = CRITERION(outputs, targets, 3.0)
    with torch.autocast("cpu", torch.bfloat16):
        half = CRITERION(outputs, targets, 3.0)
    assert all(torch.equal(half[key], value) and half[key].dtype == torch.float32 for key, value in exact.items())


def test_criterion_two_thousand_objects() -> None:
    outputs = random_outputs(1, 300, layers=6)
    losses = CRITERION(outputs, random_targets(2000), 2000.0)
    assert CRITERION.total(losses).isfinite()


def test_criterion_diverged_model_gives_non_finite_loss() -> None:
    outputs = random_outputs(1, 4)
    with torch.no_grad():
        outputs["pred_logits"].fill_(float("nan"))
    assert not CRITERION.total(CRITERION(outputs, random_targets(2), 2.0)).isfinite()
