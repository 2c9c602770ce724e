"""Assignments against brute force and against the published cost formula; odd inputs."""

from itertools import permutations
from typing import Any

import pytest
import torch
import torchvision
from support.model import random_outputs, random_targets
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.model import matcher
from pipeline.model.boxes import cxcywh_to_xyxy
from pipeline.model.matcher import GroundTruth, HungarianMatcher, Match, Predictions

MATCHER = HungarianMatcher(LossConfig())


def predictions(*layers: dict[str, Any]) -> Predictions:
    logits, boxes = (torch.stack([layer[k].detach() for layer in layers]) for k in ("pred_logits", "pred_boxes"))
    return Predictions(logits, boxes)


def rows(match: Match) -> set[tuple[int, ...]]:
    return {tuple(row) for row in torch.stack([match.layers, match.images, match.queries, match.objects], 1).tolist()}


def published_costs(logits: Tensor, boxes: Tensor, target: dict[str, Tensor]) -> Tensor:
    """[Q, n] of one image and layer, with whole matrices as the published code has them."""
    p = logits.sigmoid()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    classes = (positive - negative)[:, target["labels"]]
    distance = torch.cdist(boxes, target["boxes"], p=1)
    giou = torchvision.ops.generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target["boxes"]))
    return 5 * distance + 2 * classes - 2 * giou


def test_costs_are_published() -> None:
    targets, layers = random_targets(3, 0, 2), predictions(random_outputs(3, 7), random_outputs(3, 7, seed=2))
    costs = MATCHER.costs(layers, GroundTruth.of(targets))
    assert costs.shape == (2, 5, 7)
    for layer in range(2):
        for image, part in zip((0, 2), costs[layer].split([3, 2]), strict=True):
            expected = published_costs(layers.logits[layer, image], layers.boxes_cxcywh[layer, image], targets[image])
            torch.testing.assert_close(part.T, expected, rtol=1e-5, atol=1e-5)


def test_costs_softmax_class_is_negative_probability() -> None:
    softmax = HungarianMatcher(LossConfig(classification="softmax", class_cost=1))
    only_boxes = HungarianMatcher(LossConfig(classification="softmax", class_cost=0))
    layers, truth = predictions(random_outputs(2, 7, classes=6)), GroundTruth.of(random_targets(3, 2))
    difference = softmax.costs(layers, truth) - only_boxes.costs(layers, truth)
    p = layers.logits.softmax(-1)
    for row, (image, label) in enumerate(zip(truth.images, truth.labels, strict=True)):
        torch.testing.assert_close(difference[0, row], -p[0, image, :, label], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_matcher_softmax_assignment_is_cheapest(seed: int) -> None:
    softmax = HungarianMatcher(LossConfig(classification="softmax", class_cost=1))
    layers, truth = (
        predictions(random_outputs(1, 6, classes=6, seed=seed)),
        GroundTruth.of(random_targets(3, seed=seed)),
    )
    cost = softmax.costs(layers, truth)[0]
    (match,) = softmax([layers], [truth])
    best = min(sum(cost[i, q] for i, q in enumerate(queries)) for queries in permutations(range(6), 3))
    torch.testing.assert_close(cost[match.objects, match.queries].sum(), best)


def test_costs_do_not_depend_on_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, truth = predictions(random_outputs(2, 7)), GroundTruth.of(random_targets(4, 5))
    whole = MATCHER.costs(layers, truth)
    monkeypatch.setattr(matcher, "MATCHER_CHUNK_CELLS", 15)  # two objects at once
    torch.testing.assert_close(MATCHER.costs(layers, truth), whole)


@pytest.mark.parametrize("seed", range(4))
def test_matcher_assignment_is_cheapest(seed: int) -> None:
    layers, truth = predictions(random_outputs(1, 6, seed=seed)), GroundTruth.of(random_targets(3, seed=seed))
    cost = MATCHER.costs(layers, truth)[0]
    (match,) = MATCHER([layers], [truth])
    found = cost[match.objects, match.queries].sum()
    best = min(sum(cost[i, q] for i, q in enumerate(queries)) for queries in permutations(range(6), 3))
    torch.testing.assert_close(found, best)


def test_matcher_images_and_layers_are_independent() -> None:
    outputs, targets = [random_outputs(3, 8, seed=s) for s in (1, 2)], random_targets(2, 0, 4)
    (both,) = MATCHER([predictions(*outputs)], [GroundTruth.of(targets)])
    assert both.layers.tolist() == [0] * 6 + [1] * 6
    alone = set()
    for layer, output in enumerate(outputs):
        for image, start in ((0, 0), (1, 2), (2, 2)):
            one = {key: output[key][image : image + 1] for key in ("pred_logits", "pred_boxes")}
            (match,) = MATCHER([predictions(one)], [GroundTruth.of([targets[image]])])
            alone |= {(layer, image, query, obj + start) for _, _, query, obj in rows(match)}
    assert rows(both) == alone


def test_matcher_sets_with_other_queries_in_one_call() -> None:
    outputs, truth = random_outputs(2, 6, enc=30), GroundTruth.of(random_targets(2, 1))
    sets = [predictions(outputs, *outputs["aux_outputs"]), predictions(outputs["enc_outputs"])]
    together = MATCHER(sets, [truth, truth])
    assert [len(match.objects) for match in together] == [9, 3]
    assert [rows(m) for m in together] == [rows(MATCHER([one], [truth])[0]) for one in sets]


@pytest.mark.parametrize("counts", [(0,), (0, 0, 0)])
def test_matcher_without_objects_gives_no_pairs(counts: tuple[int, ...]) -> None:
    layers = predictions(random_outputs(len(counts), 4))
    (match,) = MATCHER([layers], [GroundTruth.of(random_targets(*counts))])
    assert rows(match) == set()


def test_matcher_more_objects_than_queries() -> None:
    (match,) = MATCHER([predictions(random_outputs(1, 3))], [GroundTruth.of(random_targets(5))])
    assert sorted(match.queries.tolist()) == [0, 1, 2]
    assert len(set(match.objects.tolist())) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_matcher_non_finite_predictions_are_last(value: float) -> None:
    outputs = random_outputs(1, 4)
    with torch.no_grad():
        outputs["pred_boxes"][0, :2] = value
        outputs["pred_logits"][0, 0] = value
    (match,) = MATCHER([predictions(outputs)], [GroundTruth.of(random_targets(2))])
    assert sorted(match.queries.tolist()) == [2, 3]
    with torch.no_grad():
        outputs["pred_boxes"][:] = value
    assert len(MATCHER([predictions(outputs)], [GroundTruth.of(random_targets(2))])[0].queries) == 2


def test_costs_use_configured_weights() -> None:
    outputs = random_outputs(1, 5)
    truth = GroundTruth.of(random_targets(2))
    only_l1 = HungarianMatcher(LossConfig(class_cost=0, giou_cost=0, bbox_cost=1))
    expected = torch.cdist(truth.boxes_cxcywh, outputs["pred_boxes"][0].detach(), p=1)
    torch.testing.assert_close(only_l1.costs(predictions(outputs), truth)[0], expected)
