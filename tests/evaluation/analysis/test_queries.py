"""Recall over queries: one detection of each query, and the share of objects that the best of them find."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.detection_sets import detections_of, draw_set, truth_of
from torch import Tensor, nn

from pipeline.config import AugmentConfig, DataConfig, EvaluationConfig
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.evaluation.analysis.analyse import analyse
from pipeline.evaluation.analysis.numbers import Evaluation
from pipeline.evaluation.analysis.queries import BestClass, query_recall
from pipeline.evaluation.analysis.table import build_table
from pipeline.evaluation.coco import ground_truth
from pipeline.evaluation.evaluator import build_evaluator
from pipeline.model.postprocess import postprocess
from pipeline.runtime import single


class Fixed(nn.Module):
    """A model with given outputs."""

    def __init__(self, **outputs: object) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, object]:
        return self.outputs


def test_best_class_gives_one_detection_per_query() -> None:
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 7, 5), torch.rand(2, 7, 4)
    outputs = BestClass(Fixed(pred_logits=logits, pred_boxes=boxes))(torch.zeros(0), torch.zeros(0))
    for found, own in zip(postprocess(outputs, torch.full((2, 2), 100), top_k=7), logits, strict=True):
        best = own.sigmoid().max(-1)
        order = best.values.argsort(descending=True)
        assert torch.equal(found["scores"], best.values[order])
        assert torch.equal(found["labels"], best.indices[order])


class Answers(nn.Module):
    """The same 12 queries with three categories for every image."""

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(1, 12, 3, generator=generator).expand(len(images), -1, -1)
        return {"pred_logits": logits, "pred_boxes": torch.full((len(images), 12, 4), 0.5)}


def test_best_class_through_an_evaluator_gives_every_query_of_every_image(tmp_path: Path) -> None:
    annotations, images = write_synthetic(tmp_path / "drawn", images=3, seed=4)
    build_shards(annotations, images, tmp_path / "shards")
    data = DataConfig(val=str(tmp_path / "shards"), workers=0, augment=AugmentConfig(eval_size=96, max_size=160))
    evaluator = build_evaluator(data, EvaluationConfig(top_k=12), single("cpu"))
    result = evaluator.run(BestClass(Answers()))
    assert result is not None
    found = result.detections
    assert np.unique(found.image_ids, return_counts=True)[1].tolist() == [12, 12, 12]
    assert found.scores.min() > 0
    truth = ground_truth(str(tmp_path / "shards"))
    analysis = analyse(truth, found, queries=found, draws=0)
    assert analysis.queries is not None
    assert analysis.queries.queries == (1, 2, 3, 5, 10, 12)


def test_best_class_leaves_softmax_heads_and_baselines_alone() -> None:
    for outputs in ({"pred_logits": torch.randn(1, 3, 4), "softmax": True}, {"detections": []}):
        assert BestClass(Fixed(**outputs))(torch.zeros(0), torch.zeros(0)) == outputs


def test_query_recall_counts_queries_and_ignores_categories_for_boxes() -> None:
    truth = truth_of([(1, 1, (0, 0, 40, 40)), (1, 2, (100, 0, 40, 40)), (2, 1, (0, 0, 40, 40))], 2, 2)
    rows = [
        *((1, 2, (0, 0, 40, 40), 0.9), (1, 2, (100, 0, 40, 40), 0.8)),
        *((2, 1, (300, 0, 40, 40), 0.9), (2, 1, (300, 90, 40, 40), 0.8), (2, 1, (0, 0, 40, 40), 0.7)),
    ]
    result = query_recall(build_table(truth, detections_of(rows), limit=None))
    assert result.queries == (1, 2, 3)
    assert result.recall == pytest.approx((0.0, 0.5, 0.75))  # class 1: 0, 0, 1 of 2; class 2: 0, 1, 1 of 1
    assert result.box_recall == pytest.approx((0.25, 0.75, 1.0))


@pytest.mark.parametrize("seed", range(3))
def test_query_recall_grows_to_ar100_and_boxes_alone_are_easier(seed: int) -> None:
    truth, found = draw_set(seed)
    table = build_table(truth, found, limit=None)
    result = query_recall(table)
    assert list(result.recall) == sorted(result.recall)
    assert result.recall[-1] == pytest.approx(Evaluation(table).numbers().metrics["AR100"])
    assert result.box_recall[-1] >= result.recall[-1]


def test_query_recall_without_detections_is_zero() -> None:
    truth, found = draw_set(1)
    assert query_recall(build_table(truth, found[found.scores > 2], limit=None)).recall == (0.0,)
