"""The analysis of one set of detections, and the comparison of two on the same images.

Raises DetectionError for detections that cannot be scored.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.evaluation.analysis.bins import aspect_bins, size_bins
from pipeline.evaluation.analysis.bootstrap import LEVEL, Sample, differences, draw, estimates
from pipeline.evaluation.analysis.confusion import confusion
from pipeline.evaluation.analysis.images import Images, changed_images
from pipeline.evaluation.analysis.numbers import Evaluation
from pipeline.evaluation.analysis.queries import query_recall
from pipeline.evaluation.analysis.result import (
    CAUSES,
    Analysis,
    CategoryDifference,
    CategoryResult,
    Comparison,
    Errors,
    Estimate,
    ThresholdCurve,
)
from pipeline.evaluation.analysis.table import Table, build_table
from pipeline.evaluation.analysis.thresholds import category_points, threshold_curve
from pipeline.evaluation.analysis.verdicts import Verdicts, error_counts, errors, judge
from pipeline.evaluation.coco import METRICS, mean_known
from pipeline.evaluation.detections import Detections

DRAWS = 200


def analyse(
    ground_truth: dict[str, Any],
    detections: Detections,
    image_ids: Collection[int] | None = None,
    *,
    against: Detections | None = None,
    queries: Detections | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Analysis:
    """Say why the AP of `detections` is what it is.

    Args:
        ground_truth: as for `coco.coco_scores`.
        detections: as for `coco.coco_scores`.
        image_ids: the images that were evaluated, if not all of them.
        against: detections of another model on the same images, to compare with.
        queries: one detection of each query, see `queries.BestClass`.
        draws: of the bootstrap; 0 gives no intervals and everything else.
        seed: of the draws.

    Returns:
        Values bit-equal to pycocotools where it has the number.

    Raises:
        DetectionError: see `Detections.check_and_sort`.
    """
    ours = _Side(build_table(ground_truth, detections, image_ids), draws, seed)
    recall = None if queries is None else query_recall(build_table(ground_truth, queries, image_ids, limit=None))
    found = replace(ours.analysis(), queries=recall)
    if against is None:
        return found
    theirs = _Side(build_table(ground_truth, against, image_ids), draws, seed)
    return replace(found, comparison=_compare(ours, theirs))


def compare(
    ground_truth: dict[str, Any],
    ours: Detections,
    theirs: Detections,
    image_ids: Collection[int] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Compare two models on the same images by a paired bootstrap; arguments and errors as those of `analyse`."""
    sides = [_Side(build_table(ground_truth, its, image_ids), draws, seed) for its in (ours, theirs)]
    return _compare(*sides)


@dataclass(frozen=True)
class _Side:
    """One of two models."""

    table: Table
    draws: int
    seed: int

    @cached_property
    def sample(self) -> Sample:
        return draw(Evaluation(self.table), len(self.table.image_ids), self.draws, self.seed)

    @cached_property
    def verdicts(self) -> Verdicts:
        return judge(self.table)

    @cached_property
    def errors(self) -> Errors:
        return errors(self.verdicts)

    @cached_property
    def thresholds(self) -> ThresholdCurve:
        return threshold_curve(self.verdicts)

    @cached_property
    def images(self) -> Images:
        return Images(self.verdicts, self.thresholds.best.threshold)

    def analysis(self) -> Analysis:
        table, found = self.table, estimates(self.sample)
        return Analysis(
            images=len(table.image_ids),
            objects=int(np.count_nonzero(~table.objects.crowd)),
            detections=len(table.found),
            draws=self.draws,
            seed=self.seed,
            level=LEVEL,
            metrics=dict(zip(METRICS, found, strict=False)),
            categories=self.categories(found[len(METRICS) :]),
            errors=self.errors,
            kept_errors=errors(judge(table.from_score(self.thresholds.best.threshold))),
            confusion=confusion(self.verdicts, self.thresholds.best.threshold),
            thresholds=self.thresholds,
            sizes=size_bins(table),
            aspect_ratios=aspect_bins(table),
            worst=self.images.worst(),
            most_missed=self.images.most_missed(),
        )

    def categories(self, aps: Sequence[Estimate]) -> tuple[CategoryResult, ...]:
        table, curve = self.table, self.sample.whole.whole
        number = len(table.category_ids)
        kept = ~table.objects.crowd
        present = np.unique(table.objects.images[kept] * number + table.objects.categories[kept])
        columns = zip(
            table.category_ids.tolist(),
            table.names,
            table.positives(table.objects.crowd).tolist(),
            np.bincount(present % max(1, number), minlength=number).tolist(),
            np.bincount(table.found.categories, minlength=number).tolist(),
            aps,
            category_points(self.verdicts),
            error_counts(self.verdicts).T.tolist(),
            strict=True,
        )
        return tuple(
            CategoryResult(
                id=category,
                name=name,
                objects=objects,
                images=images,
                detections=detections,
                ap=ap,
                ap50=mean_known(curve.precision[[0], :, k]),
                ap75=mean_known(curve.precision[[5], :, k]),
                ar100=mean_known(curve.recall[:, k]),
                best=point,
                errors=dict(zip(CAUSES, counts, strict=True)),
            )
            for k, (category, name, objects, images, detections, ap, point, counts) in enumerate(columns)
        )


def _compare(ours: _Side, theirs: _Side) -> Comparison:
    found = differences(ours.sample, theirs.sample)
    table = ours.table
    objects = table.positives(table.objects.crowd).tolist()
    gained, lost = changed_images(ours.images, theirs.images)
    return Comparison(
        draws=ours.draws,
        seed=ours.seed,
        level=LEVEL,
        metrics=dict(zip(METRICS, found, strict=False)),
        categories=tuple(
            CategoryDifference(category, name, count, difference)
            for category, name, count, difference in zip(
                table.category_ids.tolist(), table.names, objects, found[len(METRICS) :], strict=True
            )
        ),
        error_costs={
            cost.cause: (cost.ap_cost, other.ap_cost)
            for cost, other in zip(ours.errors.costs, theirs.errors.costs, strict=True)
        },
        gained=gained,
        lost=lost,
    )
