"""Image sizes that stand for all: every image counts once, and the mean area stays."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.presets.rows import VAL_SIZES
from tune.results.costs import SIZES, group_sizes

SIDES = st.tuples(st.integers(1, 1333), st.integers(1, 1333))


@given(st.dictionaries(SIDES, st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 8))
def test_group_sizes_counts_every_image_once(sizes: dict[tuple[int, int], int], most: int) -> None:
    found = group_sizes(sizes, most)
    assert len(found) <= max(most, 1)
    assert sum(found.values()) == sum(sizes.values())
    assert set(found) <= set(sizes)
    assert group_sizes(sizes, len(sizes)) == sizes


def test_group_sizes_keeps_the_mean_area_of_coco() -> None:
    def mean_area(sizes: dict[tuple[int, int], int]) -> float:
        return sum(height * width * images for (height, width), images in sizes.items()) / sum(sizes.values())

    whole = dict(VAL_SIZES)
    assert len(whole) > SIZES
    assert abs(mean_area(group_sizes(whole)) / mean_area(whole) - 1) < 0.02
