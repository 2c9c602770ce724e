"""pycocotools, the reference: none of its arithmetic is repeated or changed here.

It prints to standard output; the redirection affects the whole process while it runs.
"""

import contextlib
import io
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.backends.base import Arrays, Task

if TYPE_CHECKING:
    from pycocotools.coco import COCO


class Pycocotools:
    """Backend of the package of that name."""

    package = "pycocotools"

    def run(self, task: Task) -> Arrays:
        """See Backend."""
        from pycocotools.cocoeval import COCOeval  # not at the top: refusals load no package

        with contextlib.redirect_stdout(io.StringIO()):
            truth, detections = _index(task, task.objects.annotations()), _index(task, task.found.annotations())
            evaluation = COCOeval(truth, detections, "bbox")
            evaluation.params.maxDets = list(task.limits)
            evaluation.evaluate()
            evaluation.accumulate()
        result = evaluation.eval
        return Arrays(result["precision"], result["recall"], result["scores"])


def _index(task: Task, annotations: list[dict[str, Any]]) -> "COCO":
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(1, task.images + 1)],
        "categories": [{"id": category} for category in range(1, task.categories + 1)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
