"""A range of sizes is a range of pycocotools, and a planted weakness shows in its bin."""

import numpy as np
import pytest
from support.coco_reference import perfect, reference
from support.detection_sets import draw_set, truth_of

from pipeline.evaluation.analysis.bins import RATIOS, SIDES, aspect_bins, size_bins
from pipeline.evaluation.analysis.table import build_table
from pipeline.evaluation.coco import mean_known


@pytest.mark.parametrize("seed", range(3))
def test_size_bins_are_area_ranges_of_pycocotools(seed: int) -> None:
    truth, found = draw_set(seed)
    sides = list(zip(SIDES[:-1], (*SIDES[1:-1], 1e5), strict=True))
    _, expected = reference(truth, found.to_results(), sides=sides)
    bins = size_bins(build_table(truth, found))
    assert len(bins) == len(SIDES) - 1
    for number, own in enumerate(bins):
        assert own.ap == mean_known(expected.precision[..., number, -1])
        assert own.ap50 == mean_known(expected.precision[0, ..., number, -1])
        assert own.ar100 == mean_known(expected.recall[..., number, -1])


def test_bins_of_a_perfect_detector_are_one_or_empty() -> None:
    truth, _ = draw_set(5)
    table = build_table(truth, perfect(truth))
    for bins in (size_bins(table), aspect_bins(table)):
        assert sum(b.objects for b in bins) == np.count_nonzero(~table.objects.crowd)
        for b in bins:
            assert [b.ap, b.ap50, b.ar100] == pytest.approx([1.0 if b.objects else -1.0] * 3, abs=1e-12)


def test_aspect_bins_show_the_shape_that_is_not_found() -> None:
    tall, wide, square = (0, 0, 20, 100), (200, 0, 100, 20), (400, 0, 50, 50)
    truth = truth_of([(image, 1, box) for image in range(1, 6) for box in (tall, wide, square)], 5, 1)
    found = perfect(truth)
    bins = aspect_bins(build_table(truth, found[found.boxes_xywh[:, 2] > 20]))
    recalls = {b.low: b.ar100 for b in bins if b.objects}
    assert recalls == {0.0: 0.0, 0.75: 1.0, 4.0: 1.0}
    assert [b.high for b in bins] == list(RATIOS[1:])


def test_aspect_bins_boxes_without_height_or_size_are_counted_once() -> None:
    truth = truth_of([(1, 1, (0, 0, 30, 0)), (1, 1, (50, 50, 0, 0)), (1, 1, (90, 90, 0, 30))], 1, 1)
    bins = aspect_bins(build_table(truth, perfect(truth)))
    assert [b.objects for b in bins] == [1, 0, 0, 1, 0, 0, 1]
