"""The worst images come first, with what is to be drawn, and changes between two models go to the right list."""

import numpy as np
import pytest
from support.coco_reference import perfect
from support.detection_sets import detections_of, draw_set, truth_of

from pipeline.evaluation.analysis.images import SHOWN, Images, changed_images
from pipeline.evaluation.analysis.table import build_table
from pipeline.evaluation.analysis.verdicts import judge
from pipeline.evaluation.detections import Detections

BOXES = [(100.0 * place, 0.0, 50.0, 50.0) for place in range(4)]
TRUTH = truth_of([(image, 1, box) for image in (1, 2, 3) for box in BOXES], 4, 2)
PERFECT = [(image, 1, box, 0.9) for image in (1, 2, 3) for box in BOXES]


def images_of(found: Detections, threshold: float = 0.5) -> Images:
    return Images(judge(build_table(TRUTH, found)), threshold)


def test_images_worst_and_most_missed_are_the_planted_ones() -> None:
    missing = [row for row in PERFECT if row[0] != 2 or row[2] == BOXES[0]]  # image 2 misses 3 of 4
    invented = [(1, 2, (100.0 * k, 300.0, 50.0, 50.0), 0.8) for k in range(2)]  # image 1 has 2 wrong ones
    low = [(3, 2, (0.0, 300.0, 50.0, 50.0), 0.4)]  # below the threshold
    images = images_of(detections_of([*missing, *invented, *low]))
    assert [image.image_id for image in images.worst()] == [2, 1]
    (missed,) = images.most_missed()
    assert (missed.image_id, missed.correct, missed.wrong, missed.missed) == (2, 1, 0, 3)
    assert missed.f1 == pytest.approx(2 / 5)
    assert [obj.found for obj in missed.objects] == [True, False, False, False]
    wrong = images.worst()[1]
    assert [d.cause for d in wrong.detections] == [None] * 4 + ["background"] * 2
    assert wrong.detections[4].box_xywh == (0.0, 300.0, 50.0, 50.0)
    assert images.result(3).f1 == 1.0  # image 4 is empty and nothing was found


def test_images_lists_are_limited_and_ordered() -> None:
    truth, found = draw_set(9, images=200)
    images = Images(judge(build_table(truth, found)), 0.3)
    worst, missed = images.worst(), images.most_missed()
    assert len(worst) == len(missed) == SHOWN
    assert [image.f1 for image in worst] == sorted(image.f1 for image in worst)
    assert [image.missed for image in missed] == sorted((image.missed for image in missed), reverse=True)
    assert missed[0].missed == images.missed.max()
    for image in worst:
        causes = [d.cause for d in image.detections]
        assert image.wrong <= sum(cause is not None for cause in causes)
        assert image.missed == sum(not obj.found for obj in image.objects)
        scores = [d.score for d in image.detections]
        assert scores == sorted(scores, reverse=True)
        assert min(scores, default=0.3) >= 0.3


def test_images_crowd_region_counts_as_found_and_not_as_an_object() -> None:
    region = {"image_id": 4, "category_id": 1, "bbox": [0, 0, 90, 90], "area": 8100, "iscrowd": 1}
    truth = {**TRUTH, "annotations": [*TRUTH["annotations"], region]}
    images = Images(judge(build_table(truth, perfect(TRUTH))), 0.5)
    result = images.result(3)
    assert (result.image_id, result.missed, result.f1) == (4, 0, 1.0)
    assert [(obj.crowd, obj.found) for obj in result.objects] == [(True, True)]


def test_changed_images_are_gained_or_lost() -> None:
    all_found = images_of(detections_of(PERFECT))
    without = images_of(detections_of([row for row in PERFECT if row[0] != 3]))
    gained, lost = changed_images(all_found, without)
    assert [pair.this.image_id for pair in gained] == [3]
    assert (gained[0].this.missed, gained[0].other.missed) == (0, 4)
    assert lost == ()
    assert changed_images(without, all_found)[1][0].this.missed == 4
    assert changed_images(without, without) == ((), ())
    assert np.array_equal(without.errors, [0, 0, 4, 0])
