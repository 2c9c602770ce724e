"""The section of an analysis' page that compares two models. Never fails."""

from collections.abc import Mapping, Sequence

from pipeline.evaluation.analysis.cells import explain_intervals, interval_cells, known, plot_parts
from pipeline.evaluation.analysis.drawings import COLOURS
from pipeline.evaluation.analysis.result import Comparison, Difference
from pipeline.pages.figures import Drawing
from pipeline.pages.parts import Cell, Column, Heading, ImageFile, Part, Row, Table, Text


def comparison_parts(
    comparison: Comparison, plots: Mapping[str, Drawing], drawn: Mapping[str, Sequence[ImageFile]]
) -> list[Part]:
    """Differences of numbers, classes and causes of errors, and the images in which the models differ."""
    columns = [
        Column("this"),
        Column("other"),
        Column("difference"),
        Column("low"),
        Column("high"),
        Column("better", 2, "share of the draws in which this model is better; equal numbers count half"),
    ]
    metrics = [[name, *_difference(each)] for name, each in comparison.metrics.items()]
    classes = sorted(comparison.categories, key=lambda each: each.ap.difference.value)
    rows = [[each.name, each.objects, *_difference(each.ap)] for each in classes]
    costs: list[list[Cell]] = [[cause, *pair] for cause, pair in comparison.error_costs.items()]
    text = f"This model minus the other, on the same images.{explain_intervals(comparison)}"
    if comparison.draws:
        text += " Both models get the same draws. An interval without 0 is more than the choice of images explains."
    parts: list[Part] = [
        Heading("Comparison"),
        Text(text),
        Row(
            [
                *plot_parts(plots, "differences"),
                Table("The 12 COCO numbers of both models", [Column("number"), *columns], metrics),
            ]
        ),
        Table("AP of each class in both models", [Column("class"), Column("objects"), *columns], rows),
        Table("AP50 cost of each cause", [Column("cause"), Column("this"), Column("other")], costs),
    ]
    if drawn.get("gained") or drawn.get("lost"):
        parts.append(Text(f"{COLOURS} In the ground truth the colours are those of this model."))
    for name, text in (("gained", "fewer"), ("lost", "more")):
        if drawn.get(name):
            parts += [Heading(f"Images with {text} errors than in the other model", 3), Row(drawn[name])]
    return parts


def _difference(each: Difference) -> list[Cell]:
    """The cells of this, other, difference, low, high and better."""
    if each.value < 0 or each.other < 0:
        return [known(each.value), known(each.other), None, None, None, None]
    return [each.value, each.other, each.difference.value, *interval_cells(each.difference.interval), each.better]
