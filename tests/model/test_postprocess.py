"""Top pairs over queries and classes, in pixels of the original image."""

import pytest
import torch
from support.model import random_outputs

from pipeline.model.postprocess import postprocess, sort_by_score


def test_postprocess_by_hand() -> None:
    logits = torch.tensor([[[0.0, 3.0], [2.0, -1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    (found,) = postprocess({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]), top_k=3)
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 2.0, 0.0]).sigmoid())
    assert found["labels"].tolist() == [1, 0, 0]  # the first query comes twice, under both classes
    expected = torch.tensor([[80.0, 30, 120, 70], [0, 0, 100, 100], [80, 30, 120, 70]])
    torch.testing.assert_close(found["boxes_xyxy"], expected)


def test_postprocess_uses_size_of_each_image() -> None:
    outputs = random_outputs(2, 20)
    sizes = torch.tensor([[480, 640], [1, 1]])
    big, unit = postprocess(outputs, sizes)
    assert len(big["scores"]) == 100
    assert big["boxes_xyxy"].max() > 100
    assert unit["boxes_xyxy"].max() < 2
    for found in (big, unit):
        assert (found["scores"].diff() <= 0).all()
        assert not found["scores"].requires_grad


@pytest.mark.parametrize(("top_k", "count"), [(5, 5), (100, 20)])
def test_postprocess_top_k_above_number_of_pairs(top_k: int, count: int) -> None:
    (found,) = postprocess(random_outputs(1, 4), torch.tensor([[10, 10]]), top_k)
    assert {key: len(value) for key, value in found.items()} == dict.fromkeys(("scores", "labels", "boxes_xyxy"), count)


def test_postprocess_bfloat16_gives_float32() -> None:
    outputs = {k: v.bfloat16() for k, v in random_outputs(1, 4).items() if k != "aux_outputs"}
    (found,) = postprocess(outputs, torch.tensor([[1333, 800]]))
    assert found["boxes_xyxy"].dtype == found["scores"].dtype == torch.float32


def softmax_outputs(images: int, queries: int, seed: int = 0) -> dict[str, object]:
    return {**random_outputs(images, queries, classes=6, seed=seed), "softmax": True}


def test_postprocess_softmax_by_hand() -> None:
    logits = torch.tensor([[[0.0, 1.0, 9.0], [2.0, 0.0, -9.0], [-1.0, 3.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]]])
    outputs = {"pred_logits": logits, "pred_boxes": boxes, "softmax": True}
    (found,) = postprocess(outputs, torch.tensor([[100, 200]]))
    assert found["labels"].tolist() == [1, 0, 1]  # one label each, and "no object" is none
    p = logits[0].softmax(-1)
    torch.testing.assert_close(found["scores"], torch.stack([p[0, 1], p[1, 0], p[2, 1]]))  # in the queries' order
    expected = torch.tensor([[80.0, 30, 120, 70], [0, 0, 100, 100], [0, 0, 200, 100]])
    torch.testing.assert_close(found["boxes_xyxy"], expected)


@pytest.mark.parametrize("top_k", [1, 5, 12, 100])
def test_postprocess_softmax_keeps_order_of_queries(top_k: int) -> None:
    sizes = torch.tensor([[480, 640], [10, 10]])
    outputs = softmax_outputs(2, 12)
    for whole, some in zip(postprocess(outputs, sizes), postprocess(outputs, sizes, top_k), strict=True):
        kept = whole["scores"] >= whole["scores"].sort(descending=True).values[min(top_k, 12) - 1]
        assert all(torch.equal(some[key], whole[key][kept]) for key in whole)


def test_sort_by_score_sorts_all_keys_and_keeps_ties() -> None:
    scores = torch.tensor([0.2, 0.7, 0.2, 0.9])
    found = sort_by_score({"scores": scores, "labels": torch.arange(4), "boxes_xyxy": torch.arange(16).view(4, 4)})
    assert found["labels"].tolist() == [3, 1, 0, 2]
    assert found["boxes_xyxy"][:, 0].tolist() == [12, 4, 0, 8]
    (sigmoid,) = postprocess(random_outputs(1, 30), torch.tensor([[10, 10]]))
    assert all(torch.equal(values, sigmoid[key]) for key, values in sort_by_score(sigmoid).items())
