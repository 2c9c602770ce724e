"""ultrafast-pycocotools (Rust, all cores). Raises ImportError if it is not installed.

It prints to standard output; the redirection affects the whole process while it runs.
"""

import contextlib
import io

from pipeline.evaluation.backends.base import Arrays, Task


class Ultrafast:
    """Backend of the package ultrafast-pycocotools."""

    package = "ultrafast-pycocotools"

    def run(self, task: Task) -> Arrays:
        """See Backend."""
        from ultrafast_pycocotools import COCO, COCOeval  # only here: it may be missing

        truth = COCO(
            {
                "images": [{"id": image} for image in range(1, task.images + 1)],
                "categories": [{"id": category} for category in range(1, task.categories + 1)],
                "annotations": task.objects.annotations(),
            },
            verbose=False,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            detections = truth.loadRes(task.found.rows())
            evaluation = COCOeval(truth, detections, "bbox")
            evaluation.params.maxDets = list(task.limits)
            evaluation.evaluate()
            evaluation.accumulate()
        result = evaluation.eval
        return Arrays(result["precision"], result["recall"], result["scores"])
