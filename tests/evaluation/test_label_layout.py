"""Labels are placed at their boxes, inside the image, and do not hide each other."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.label_layout import place_labels

CANVAS, LABEL = (640, 480), (80.0, 18.0)
SIDES = st.tuples(st.floats(-50, 640), st.floats(-50, 480), st.floats(0, 300), st.floats(0, 300))


@settings(deadline=None)
@given(st.lists(SIDES, max_size=20))  # so few that a free spot is certain
def test_place_labels_crowd_gives_disjoint_labels_in_the_image(rows: list[tuple[float, float, float, float]]) -> None:
    boxes = [(x, y, x + width, y + height) for x, y, width, height in rows]
    places = place_labels(boxes, [LABEL] * len(boxes), CANVAS)
    assert len(places) == len(boxes)
    for x, y in places:
        assert 0 <= x <= CANVAS[0] - LABEL[0]
        assert 0 <= y <= CANVAS[1] - LABEL[1]
    for (ax, ay), (bx, by) in itertools.combinations(places, 2):
        assert abs(ax - bx) >= LABEL[0] - 1e-6 or abs(ay - by) >= LABEL[1] - 1e-6


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((100, 100, 200, 200), (100, 82)),  # above the box
        ((-20, 100, 200, 200), (0, 82)),
        ((600, 100, 700, 200), (560, 82)),
        ((100, 5, 200, 200), (100, 0)),  # no room above it
    ],
)
def test_place_labels_single_box_has_its_label_at_its_left_top(box: tuple[int, ...], place: tuple[int, ...]) -> None:
    assert place_labels([box], [LABEL], CANVAS) == [place]


def test_place_labels_full_image_overlaps_but_places_all() -> None:
    assert len(place_labels([(0, 0, 9, 9)] * 9, [(80, 18)] * 9, (100, 20))) == 9
    assert place_labels([(0, 0, 9, 9)], [(80, 18)], (10, 10)) == [(0, 0)]  # larger than the image
