"""Which images of a batch go through the model together, and their detections.

Only images of one resized size go together, so that none is padded: an image's detections do not depend on the others
but for rounding. A fault of one group is the result of its images alone. Pure but for the model's call.
"""

from collections.abc import Callable, Sequence

from pipeline.data.batch import Item
from pipeline.inference.detections import ImageDetections
from pipeline.inference.predictor import Limits
from pipeline.logs import get_logger

Work = tuple[Item, Limits]
DetectBatch = Callable[[Sequence[Item], Sequence[Limits]], list[ImageDetections]]

log = get_logger("serving")


def group_by_size(items: Sequence[Item], largest: int) -> list[list[int]]:
    """Positions of the items in groups of one size, each of at most `largest`, in the order of their first items."""
    groups: dict[tuple[int, int], list[list[int]]] = {}
    for position, item in enumerate(items):
        same = groups.setdefault(item.extent, [[]])
        if len(same[-1]) == largest:
            same.append([])
        same[-1].append(position)
    return sorted(group for same in groups.values() for group in same)


def detect_all(detect: DetectBatch, work: Sequence[Work], largest: int) -> list[ImageDetections | Exception]:
    """The detections of each item, or the exception of its group.

    Args:
        detect: `Predictor.detect_batch`.
        work: images and their limits.
        largest: images that may go together.
    """
    found: list[ImageDetections | Exception] = [RuntimeError()] * len(work)
    for group in group_by_size([item for item, _ in work], largest):
        try:
            results: Sequence[ImageDetections | Exception] = detect(*zip(*(work[k] for k in group), strict=True))
        except Exception as error:
            log.exception("%d images could not be computed", len(group))
            results = [error] * len(group)
        for position, result in zip(group, results, strict=True):
            found[position] = result
    return found
