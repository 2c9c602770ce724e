"""The sizes of pad groups in an epoch of COCO's size, before and after they are rounded."""

import numpy as np

from benchmarks.plan import coco_like, count_sizes


def test_count_sizes_rounding_to_64_leaves_about_a_hundred() -> None:
    images = 118_287
    rows = count_sizes(coco_like(images), np.arange(images) * 189 // images, mix_shards=16)
    found = {row["pad_multiple"]: row for row in rows}
    assert found[1]["sizes"] > 50 * found[64]["sizes"]
    assert found[64]["sizes"] <= 130
    assert found[64]["more_pixels"] < 0.07
