"""Outputs, losses, gradients and detections equal those of the authors' code with published weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support import golden_recipe
from torch import Tensor

from pipeline.config import LossConfig, ModelConfig
from pipeline.model import Detector, build_criterion, build_model
from pipeline.model.postprocess import postprocess
from pipeline.model.weights.published import export_official, load_official, official_names

DENSE = {"name": "detr", "class_head": "softmax", "ffn_dim": 2048, "queries": 100}
FLAGS = {"ms": {}, "refine": {"refine": True}, "two_stage": {"refine": True, "two_stage": True}, "detr": DENSE}
LOSS = {"detr": {"classification": "softmax", "class_weight": 1.0, "class_cost": 1.0}}
TRAINABLE = {"ms": 39_847_265, "refine": 40_627_260, "two_stage": 40_959_129, "detr": 41_302_368}
DETECTIONS = 20


@dataclass(frozen=True)
class Case:
    """One variant: recorded results, and the results of this model."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    checkpoint: dict[str, Tensor]
    model: Detector
    outputs: dict[str, Any]
    losses: dict[str, Tensor]
    total: Tensor


@pytest.fixture(
    scope="module",
    params=[("ms", "torch"), ("ms", "auto"), ("refine", "auto"), ("two_stage", "auto"), ("detr", "auto")],
    ids=lambda param: "-".join(param),
)
def case(request: pytest.FixtureRequest) -> Case:
    variant, op = request.param
    meta, arrays = golden_recipe.load(variant)
    config = ModelConfig(num_classes=91, dropout=0.0, op=op, backbone={"weights": "none"}, **FLAGS[variant])
    model = build_model(config).eval()
    checkpoint = golden_recipe.checkpoint(meta)
    load_official(model, checkpoint)
    outputs = model(*golden_recipe.batch())
    criterion = build_criterion(LossConfig(**LOSS.get(variant, {})))
    losses = criterion(outputs, golden_recipe.TARGETS, torch.tensor(4.0))
    total = criterion.total(losses)
    total.backward()
    return Case(meta, arrays, checkpoint, model, outputs, losses, total)


def test_golden_parameters(case: Case) -> None:
    trainable = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
    assert trainable == TRAINABLE[case.meta["variant"]] == case.meta["n_trainable"]
    assert sum(p.numel() for p in case.model.parameters()) == case.meta["n_params"]


def test_golden_outputs(case: Case) -> None:
    torch.testing.assert_close(
        case.outputs["pred_logits"], torch.from_numpy(case.arrays["logits"]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(case.outputs["pred_boxes"], torch.from_numpy(case.arrays["boxes"]), rtol=1e-4, atol=1e-5)


def test_golden_losses(case: Case) -> None:
    recorded = case.meta["losses"]
    assert {k: v.item() for k, v in case.losses.items()} == pytest.approx(recorded, rel=1e-4)
    assert case.total.item() == pytest.approx(case.meta["total"], rel=1e-4)


def test_golden_gradient_norms(case: Case) -> None:
    parameters = {k: p for k, p in case.model.named_parameters() if p.requires_grad}
    owner = {alias: key for key, aliases in official_names(case.model).items() for alias in aliases}
    recorded = {owner[key]: norm for key, norm in case.meta["grad_norm"].items()}
    assert recorded.keys() == parameters.keys()
    norms = {key: p.grad.double().norm().item() for key, p in parameters.items()}
    # DETR's first self-attention sees values that are all zero: its gradient is nothing but rounding (1e-7)
    assert norms == pytest.approx(recorded, rel=1e-3, abs=3e-6)


def test_golden_top_detections(case: Case) -> None:
    """Two whose scores differ by rounding may change places: which comes first depends on the processor."""
    found = postprocess(case.outputs, golden_recipe.ORIGINAL_SIZES, top_k=100)
    for image, detections in enumerate(found):
        labels, scores, boxes = detections["labels"].tolist(), detections["scores"], detections["boxes_xyxy"]
        assert len(labels) == 100
        recorded = torch.tensor(case.meta["scores"][image]), torch.tensor(case.meta["det_boxes"][image])
        torch.testing.assert_close(scores[:DETECTIONS], recorded[0], rtol=1e-4, atol=1e-5)
        free = [*range(100)]
        for label, score, box in zip(case.meta["labels"][image], *recorded, strict=True):
            same = (
                number
                for number in free
                if labels[number] == label
                and torch.isclose(scores[number], score, rtol=1e-4, atol=1e-5)
                and torch.allclose(boxes[number], box, rtol=1e-4, atol=0.05)
            )
            match = next(same, None)
            assert match is not None, f"image {image}: no detection of class {label}, score {score}, box {box}"
            free.remove(match)


def test_export_official_returns_checkpoint(case: Case) -> None:
    exported = export_official(case.model)
    assert exported.keys() == case.checkpoint.keys()
    assert all(torch.equal(exported[key], tensor) for key, tensor in case.checkpoint.items())
