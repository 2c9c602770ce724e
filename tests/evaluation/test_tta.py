"""Views of an image, and the merging of their detections, on given boxes."""

import pytest
import torch
from torch import Tensor

from pipeline.config import AugmentConfig, EvaluationConfig
from pipeline.data.transforms import EvalSize
from pipeline.evaluation.tta import eval_sizes_of, merge, unmirror

AUGMENT = AugmentConfig(eval_size=800, max_size=1333)


def found(*rows: tuple[float, int, list[float]]) -> dict[str, Tensor]:
    return {
        "scores": torch.tensor([score for score, _, _ in rows]),
        "labels": torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        "boxes_xyxy": torch.tensor([box for _, _, box in rows]).reshape(-1, 4),
    }


def test_eval_sizes_of_gives_each_size_and_its_mirror_image() -> None:
    assert eval_sizes_of(EvaluationConfig(), AUGMENT) == (EvalSize.default(AUGMENT),) == (EvalSize(800, 1333),)
    both = eval_sizes_of(EvaluationConfig(scales=(400, 800), flip=True), AUGMENT)
    assert both == (EvalSize(400, 666), EvalSize(400, 666, True), EvalSize(800, 1333), EvalSize(800, 1333, True))
    assert eval_sizes_of(EvaluationConfig(flip=True), AUGMENT) == both[2:]


def test_unmirror_twice_is_exact() -> None:
    boxes = [[3.25, 4.0, 90.5, 20.0], [0.0, 0.0, 640.0, 480.0], [-2.0, 1.0, 650.0, 5.0]]
    there = unmirror(found(*((0.5, 1, box) for box in boxes)), 640)
    assert there["boxes_xyxy"][0].tolist() == [549.5, 4.0, 636.75, 20.0]
    assert unmirror(there, 640)["boxes_xyxy"].tolist() == boxes
    assert there["scores"].tolist() == [0.5] * 3


def test_merge_single_view_is_unchanged() -> None:
    only = found((0.2, 1, [0.0, 0, 10, 10]), (0.9, 1, [0.0, 0, 10, 10]))  # equal boxes, not sorted
    assert all(torch.equal(value, only[key]) for key, value in merge([only], 0.5, 1).items())


def test_merge_two_overlapping_detections_become_one() -> None:
    first = found((0.9, 3, [10.0, 10, 50, 50]), (0.3, 3, [200.0, 10, 250, 60]))
    second = found((0.8, 3, [11.0, 10, 51, 50]), (0.4, 3, [200.0, 12, 250, 60]), (0.7, 5, [10.0, 10, 50, 50]))
    merged = merge([first, second], 0.65, 100)
    assert merged["scores"].tolist() == pytest.approx([0.9, 0.7, 0.4])
    assert merged["labels"].tolist() == [3, 5, 3]  # another class in the same place is another object
    shift, top = 0.8 / (0.9 + 0.8), (0.3 * 10 + 0.4 * 12) / 0.7  # means weighted by score
    expected = [[10 + shift, 10, 50 + shift, 50], [10, 10, 50, 50], [200, top, 250, 60]]
    torch.testing.assert_close(merged["boxes_xyxy"], torch.tensor(expected))


@pytest.mark.parametrize(("shift", "objects"), [(8.0, 1), (9.0, 2)])  # IoU 0.667 and 0.633
def test_merge_iou_is_the_limit(shift: float, objects: int) -> None:
    first, second = found((0.9, 1, [0.0, 0, 40, 40])), found((0.8, 1, [shift, 0, 40 + shift, 40]))
    assert len(merge([first, second], 0.65, 100)["scores"]) == objects


def test_merge_keeps_the_best_of_all_views_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    views = [
        found(*((score, k % 7, [100.0 * k, 0, 100.0 * k + 50, 50]) for k, score in enumerate(scores.tolist())))
        for scores in torch.rand(3, 40, generator=generator)
    ]
    merged = merge(views, 0.5, 25)
    best = torch.stack([view["scores"] for view in views]).amax(0).sort(descending=True).values
    assert torch.equal(merged["scores"], best[:25])
    again = merge(views[::-1], 0.5, 25)
    assert torch.equal(again["labels"], merged["labels"])
    torch.testing.assert_close(again["boxes_xyxy"], merged["boxes_xyxy"])


def test_merge_zero_area_and_zero_score_boxes_stay() -> None:
    flat, void = (0.9, 1, [5.0, 5, 5, 20]), (0.0, 2, [30.0, 30, 40, 40])
    merged = merge([found(flat), found(void)], 0.5, 10)
    assert merged["boxes_xyxy"].tolist() == [flat[2], void[2]]


def test_merge_empty_views_change_nothing() -> None:
    assert len(merge([found(), found()], 0.5, 10)["scores"]) == 0
    assert merge([found(), found((0.5, 2, [0.0, 0, 5, 5]))], 0.5, 10)["labels"].tolist() == [2]
