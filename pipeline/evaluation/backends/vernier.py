"""vernier (Rust) in its strict mode, which keeps every property of pycocotools.

It takes columns as they are. Raises ImportError if it is not installed.
"""

import numpy as np

from pipeline.evaluation.backends.base import Arrays, Task


class Vernier:
    """Backend of the package of that name."""

    package = "vernier"

    def run(self, task: Task) -> Arrays:
        """See Backend."""
        from vernier.instance import CocoDataset, evaluate_bbox_grid  # only here: it may be missing

        objects = task.objects
        numbers = np.arange(1, task.images + 1)
        sides = np.ones_like(numbers)  # read for masks only
        truth = CocoDataset.from_arrays(
            {"id": numbers, "width": sides, "height": sides},
            {
                "id": np.arange(1, len(objects.images) + 1),
                "image_id": objects.images,
                "category_id": objects.categories,
                "bbox": objects.boxes_xywh,
                "area": objects.areas,
                "iscrowd": objects.crowds,
            },
            [{"id": category, "name": str(category)} for category in range(1, task.categories + 1)],
        )
        grid = evaluate_bbox_grid(
            truth, task.found.rows(), parity_mode="strict", max_dets_per_image=task.limits[-1], use_cats=True
        )
        result = grid.accumulate(list(task.limits))
        return Arrays(result.precision, result.recall, result.scores)
