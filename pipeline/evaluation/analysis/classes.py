"""An analysis as text for a terminal: its classes, worst first, and its AP. Never fails."""

from pipeline.evaluation.analysis.result import Analysis, CategoryResult, Estimate
from pipeline.evaluation.class_table import ClassScore, class_table


def worst_first(analysis: Analysis) -> list[CategoryResult]:
    """The classes by ascending AP; those without objects come last."""
    return sorted(analysis.categories, key=lambda each: (each.ap.value < 0, each.ap.value, each.name, each.id))


def table_of_classes(analysis: Analysis, limit: int) -> str:
    """At most `limit` classes by ascending AP; a last line says how many more there are."""
    scores = [
        ClassScore(each.id, each.name, each.objects, each.ap.value, each.ap50, each.ap75, each.ar100)
        for each in worst_first(analysis)
    ]
    lines = class_table(scores[:limit])
    more = scores[limit:]
    if not more:
        return lines
    without = sum(not each.objects for each in more)
    return f"{lines}\nand {len(more)} more classes" + (f", {without} of them without objects" if without else "")


def summarise(analysis: Analysis) -> str:
    """AP with its interval, the most expensive cause of errors, and the difference to the other model."""
    ap, costs = analysis.metrics["AP"], sorted(analysis.errors.costs, key=lambda each: -each.ap_cost)
    lines = [f"AP {_show(ap)} on {analysis.images:,} images"]
    if costs[0].ap_cost > 0:
        lines.append(f"most expensive errors: {costs[0].cause}, {costs[0].ap_cost:.3f} of AP50")
    if analysis.comparison is not None:
        difference = analysis.comparison.metrics["AP"]
        lines.append(f"the other model: AP {difference.other:.3f}, difference {_show(difference.difference)}")
    return "\n".join(lines)


def _show(estimate: Estimate) -> str:
    interval = estimate.interval
    return f"{estimate.value:.3f}" + (f" ({interval.low:.3f} to {interval.high:.3f})" if interval else "")
