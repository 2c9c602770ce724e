"""The classes of an analysis as a table for a terminal, worst first. Never fails."""

from pipeline.evaluation.analysis.result import Analysis
from pipeline.evaluation.class_table import ClassScore, class_table


def table_of_classes(analysis: Analysis, limit: int) -> str:
    """At most `limit` classes by ascending AP; a last line says how many more there are."""
    scores = [
        ClassScore(each.id, each.name, each.objects, each.ap.value, each.ap50, each.ap75, each.ar100)
        for each in sorted(analysis.categories, key=lambda each: (each.ap.value < 0, each.ap.value, each.name, each.id))
    ]
    lines = class_table(scores[:limit])
    return f"{lines}\nand {len(scores) - limit} more classes" if len(scores) > limit else lines
