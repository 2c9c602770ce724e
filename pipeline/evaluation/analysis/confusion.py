"""Which category was detected where another one is. Never fails."""

import numpy as np

from pipeline.evaluation.analysis.result import Confusion
from pipeline.evaluation.analysis.table import CORRECT_IOU
from pipeline.evaluation.analysis.verdicts import Verdicts


def confusion(verdicts: Verdicts, threshold: float) -> Confusion:
    """Count detections with a score of at least `threshold` by the category of their object and their own.

    A correct detection keeps its object. Of the others, the one with the highest score chooses first: the object with
    the highest IoU, from CORRECT_IOU on, that is left. Detections and objects without a partner belong to background.
    """
    table = verdicts.table
    found, objects, pairs = table.found, table.objects, table.pairs
    background = len(table.category_ids)
    kept = (found.scores >= threshold) & ~verdicts.in_crowd
    partner = np.where(kept, verdicts.objects, -1)
    free = ~objects.crowd
    free[partner[partner >= 0]] = False
    rest = pairs[(kept & (partner < 0))[pairs.found] & free[pairs.objects] & (pairs.ious >= CORRECT_IOU)]
    order = np.lexsort((rest.objects, -rest.ious, found.image_ranks[rest.found], found.images[rest.found]))
    for row, obj in zip(rest.found[order].tolist(), rest.objects[order].tolist(), strict=True):
        if partner[row] < 0 and free[obj]:
            partner[row], free[obj] = obj, False
    counts = np.zeros((background + 1, background + 1), np.int64)
    true = np.where(partner >= 0, np.append(objects.categories, background)[partner], background)
    np.add.at(counts, (true[kept], found.categories[kept]), 1)
    counts[:background, background] = np.bincount(objects.categories[free], minlength=background)
    return Confusion(
        threshold=threshold,
        iou=CORRECT_IOU,
        category_ids=tuple(table.category_ids.tolist()),
        counts=tuple(map(tuple, counts.tolist())),
    )
