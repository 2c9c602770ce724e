"""The images to look at: where a model is worst, where it misses most, and where two models differ. Never fails."""

import numpy as np

from pipeline.evaluation.analysis.result import DrawnDetection, DrawnObject, ImagePair, ImageResult
from pipeline.evaluation.analysis.verdicts import Verdicts
from pipeline.evaluation.backends.base import Floats, Ints

SHOWN = 24  # images of a list


class Images:
    """The images of one set of detections, at one threshold and CORRECT_IOU."""

    def __init__(self, verdicts: Verdicts, threshold: float) -> None:
        self._verdicts = verdicts
        table = verdicts.table
        images = len(table.image_ids)
        self._kept = table.found.scores >= threshold
        self._found = np.zeros(len(table.objects), np.bool_)
        self._found[verdicts.objects[self._kept & verdicts.correct]] = True
        objects = np.bincount(table.objects.images[~table.objects.crowd], minlength=images)
        self.correct: Ints = np.bincount(table.found.images[self._kept & verdicts.correct], minlength=images)
        self.wrong: Ints = np.bincount(table.found.images[self._kept & verdicts.wrong], minlength=images)
        self.missed: Ints = objects - self.correct

    @property
    def errors(self) -> Ints:
        """[I] wrong detections and missed objects."""
        return self.wrong + self.missed

    @property
    def f1(self) -> Floats:
        """[I] 1 where there is nothing to find and nothing found."""
        total = 2 * self.correct + self.errors
        f1: Floats = np.where(total > 0, 2 * self.correct / np.maximum(total, 1), 1.0)
        return f1

    def worst(self) -> tuple[ImageResult, ...]:
        """Lowest F1, then most errors, then lowest id; only images with errors."""
        order = np.lexsort((-self.errors, self.f1))
        return tuple(self.result(row) for row in order[self.errors[order] > 0][:SHOWN].tolist())

    def most_missed(self) -> tuple[ImageResult, ...]:
        """Most objects that were not found, then lowest F1, then lowest id; only images that miss some."""
        order = np.lexsort((self.f1, -self.missed))
        return tuple(self.result(row) for row in order[self.missed[order] > 0][:SHOWN].tolist())

    def result(self, row: int) -> ImageResult:
        """The image in `row` of the table, with what is to be drawn."""
        table = self._verdicts.table
        ids, found, objects = table.category_ids, table.found, table.objects
        its = np.arange(*np.searchsorted(found.images, [row, row + 1]))
        its = its[self._kept[its]]
        own = range(*np.searchsorted(objects.images, [row, row + 1]).tolist())
        return ImageResult(
            image_id=int(table.image_ids[row]),
            correct=int(self.correct[row]),
            wrong=int(self.wrong[row]),
            missed=int(self.missed[row]),
            f1=float(self.f1[row]),
            objects=tuple(
                DrawnObject(
                    category_id=int(ids[objects.categories[number]]),
                    box_xywh=_box(objects.boxes[number]),
                    crowd=bool(objects.crowd[number]),
                    found=bool(self._found[number] or objects.crowd[number]),
                )
                for number in own
            ),
            detections=tuple(
                DrawnDetection(
                    category_id=int(ids[found.categories[number]]),
                    box_xywh=_box(found.boxes[number]),
                    score=float(found.scores[number]),
                    cause=self._verdicts.cause(number),
                )
                for number in its[np.argsort(found.image_ranks[its])].tolist()
            ),
        )


def changed_images(ours: Images, theirs: Images) -> tuple[tuple[ImagePair, ...], tuple[ImagePair, ...]]:
    """The images in which `ours` has most fewer, and most more, errors than `theirs`; half of SHOWN each."""
    fewer, gain = theirs.errors - ours.errors, ours.f1 - theirs.f1
    lists = []
    for sign in (1, -1):
        order = np.lexsort((-sign * gain, -sign * fewer))
        rows = order[sign * fewer[order] > 0][: SHOWN // 2].tolist()
        lists.append(tuple(ImagePair(ours.result(row), theirs.result(row)) for row in rows))
    return lists[0], lists[1]


def _box(xywh: Floats) -> tuple[float, float, float, float]:
    x, y, width, height = xywh.tolist()
    return x, y, width, height
