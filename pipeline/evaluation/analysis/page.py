"""The page of an analysis: its numbers as tables and plots, and the images with the most errors. Never fails.

Only the drawings read anything else; they come from the caller.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.evaluation.analysis.cells import estimate_cells, explain_intervals, known, plot_parts
from pipeline.evaluation.analysis.classes import worst_first
from pipeline.evaluation.analysis.comparison import comparison_parts
from pipeline.evaluation.analysis.drawings import COLOURS, describe
from pipeline.evaluation.analysis.plots import names_of, shown_confusion
from pipeline.evaluation.analysis.result import (
    CAUSES,
    Analysis,
    Bin,
    Cause,
    ImageResult,
)
from pipeline.pages.figures import Drawing
from pipeline.pages.parts import Cell, Column, Facts, Heading, ImageFile, Page, Part, Row, Table, Text

CONFUSIONS = 40  # rows of the table of confusions
MEANINGS: Mapping[Cause, str] = {
    "classification": "the box fits an object of another class",
    "localisation": "the class is right, the box overlaps the object too little",
    "both": "the class is wrong, and the box overlaps the object too little",
    "duplicate": "the object has a better detection already",
    "background": "the box is on no object",
    "missed": "an object without any detection that an error above would explain",
}


def build_page(
    analysis: Analysis,
    title: str,
    about: Sequence[tuple[str, str]],
    plots: Mapping[str, Drawing],
    drawn: Mapping[str, Sequence[ImageFile]],
) -> Page:
    """The page.

    Args:
        analysis: everything that is shown.
        title: of the page.
        about: names and values: what was analysed.
        plots: `plots_of(analysis)`.
        drawn: the images of `worst`, `most_missed`, `gained` and `lost`; without them the page lists their ids.
    """
    parts: list[Part] = [*_summary(analysis, about)]
    if analysis.comparison is not None:
        parts += comparison_parts(analysis.comparison, plots, drawn)
    parts += _errors(analysis, plots)
    parts += _classes(analysis, plots)
    parts += _confusion(analysis, plots)
    parts += _thresholds(analysis, plots)
    parts += _shapes(analysis, plots)
    parts += _images(analysis, drawn)
    return Page(title, parts)


def class_rows(analysis: Analysis) -> list[list[Cell]]:
    """A row of CLASS_COLUMNS for each class, lowest AP first; classes without objects are last."""
    return [
        [
            each.name,
            *estimate_cells(each.ap),
            *(known(value) for value in (each.ap50, each.ap75, each.ar100)),
            *(each.objects, each.images, each.detections),
            *((each.best.threshold, each.best.precision) if each.best.f1 else (None, None)),
            *(each.best.recall, each.best.f1),
        ]
        for each in worst_first(analysis)
    ]


CLASS_COLUMNS = (
    Column("class"),
    Column("AP", meaning="average precision over IoU 0.50 to 0.95, as COCO defines it"),
    Column("low"),
    Column("high", meaning="low and high: interval of AP when the images are drawn again"),
    Column("AP50"),
    Column("AP75"),
    Column("AR100"),
    Column("objects"),
    Column("images", meaning="that have objects of the class"),
    Column("detections", meaning="the best 100 of each image"),
    Column("threshold", meaning="lowest score to keep for the highest F1 of the class, at IoU 0.5"),
    Column("precision", meaning="precision, recall and F1: at this threshold"),
    Column("recall"),
    Column("F1"),
)


def _summary(analysis: Analysis, about: Sequence[tuple[str, str]]) -> list[Part]:
    best = analysis.thresholds.best
    facts = [
        *about,
        ("Images", f"{analysis.images:,}"),
        ("Objects", f"{analysis.objects:,}, without crowd regions"),
        ("Detections", f"{analysis.detections:,}"),
        ("Best threshold", f"{best.threshold:.3f}: precision {best.precision:.3f}, recall {best.recall:.3f}"),
    ]
    rows = [[name, *estimate_cells(value)] for name, value in analysis.metrics.items()]
    columns = [Column("number"), Column("value"), Column("low"), Column("high")]
    text = "All numbers are fractions from 0 to 1. A dash means that the ground truth has no such object."
    return [
        Facts(facts),
        Heading("COCO numbers"),
        Text(f"{text}{explain_intervals(analysis)}"),
        Table("The 12 COCO numbers", columns, rows),
    ]


def _errors(analysis: Analysis, plots: Mapping[str, Drawing]) -> list[Part]:
    errors = analysis.errors
    rows: list[list[Cell]] = [
        [each.cause, MEANINGS[each.cause], each.count, each.share, each.ap_cost, kept.count, kept.share]
        for each, kept in zip(errors.costs, analysis.kept_errors.costs, strict=True)
    ]
    columns = [
        Column("cause"),
        Column("what it is"),
        Column("errors"),
        Column("share", meaning="of all errors"),
        Column("AP50 cost", meaning="by how much AP50 would rise if only these errors were corrected"),
        Column("kept", meaning="errors if detections below the best threshold are left out"),
        Column("share of kept"),
    ]
    return [
        Heading("Errors by cause"),
        Text(
            "The causes are those of TIDE (arXiv 2008.08115). A box fits an object from IoU "
            f"{errors.iou:g} on; up to IoU {errors.background_iou:g} it is on no object. Costs do not add up, because "
            f"errors hide each other. AP50 would rise by {errors.false_positive_cost:.3f} if every wrong detection had "
            f"the lowest score, and by {errors.false_negative_cost:.3f} without the objects that were not found."
        ),
        Row([*plot_parts(plots, "errors"), Table("Causes of errors", columns, rows)]),
    ]


def _classes(analysis: Analysis, plots: Mapping[str, Drawing]) -> list[Part]:
    causes = sorted(analysis.categories, key=lambda each: -sum(each.errors.values()))
    rows: list[list[Cell]] = [[each.name, *(each.errors.get(cause, 0) for cause in CAUSES)] for each in causes]
    return [
        Heading("Classes"),
        Table("Classes, lowest AP first", CLASS_COLUMNS, class_rows(analysis), sorted_by=1),
        Row(
            [
                *plot_parts(plots, "classes"),
                Table("Errors of each class by cause", [Column("class"), *(Column(cause) for cause in CAUSES)], rows),
            ]
        ),
    ]


def _confusion(analysis: Analysis, plots: Mapping[str, Drawing]) -> list[Part]:
    confusion = analysis.confusion
    names = [*(names_of(analysis)[category] for category in confusion.category_ids), "background"]
    counts = np.array(confusion.counts, np.int64).reshape(len(names), len(names))
    rows: list[list[Cell]] = [
        [names[row], names[column], int(counts[row, column]), float(counts[row, column] / counts[row].sum())]
        for row, column in np.argwhere(counts > 0)
        if row != column
    ]
    rows.sort(key=lambda row: -int(row[2] or 0))
    columns = [Column("object"), Column("detected as"), Column("times"), Column("share", meaning="of the object's row")]
    shown, _ = shown_confusion(analysis)
    merged = f" The matrix has the {len(shown) - 2} classes with the most errors." if len(shown) < len(names) else ""
    return [
        Heading("Confusion"),
        Text(
            f"Detections with a score of at least {confusion.threshold:.3f}, matched at IoU {confusion.iou:g}. An "
            "object in the column of the background was missed; a detection in its row is on no object."
            f"{merged}"
        ),
        Row(
            [
                *plot_parts(plots, "confusion"),
                Table(f"The {min(len(rows), CONFUSIONS)} most frequent confusions", columns, rows[:CONFUSIONS]),
            ]
        ),
    ]


def _thresholds(analysis: Analysis, plots: Mapping[str, Drawing]) -> list[Part]:
    best = analysis.thresholds.best
    return [
        Heading("Threshold"),
        Text(
            f"AP has no threshold, but an application needs one. Over all classes F1 is highest, {best.f1:.3f}, if "
            f"detections with a score of at least {best.threshold:.3f} are kept. The table of the classes has the best "
            "threshold of each."
        ),
        *plot_parts(plots, "thresholds"),
    ]


def _shapes(analysis: Analysis, plots: Mapping[str, Drawing]) -> list[Part]:
    parts: list[Part] = [
        Heading("Sizes and shapes"),
        Row([*plot_parts(plots, "sizes"), *plot_parts(plots, "aspect_ratios")]),
        Row(
            [
                _bins("AP by size", "side", "square root of the object's area, in pixels", analysis.sizes),
                _bins("AP by aspect ratio", "width / height", "of the object's box", analysis.aspect_ratios),
            ]
        ),
    ]
    if (queries := analysis.queries) is not None:
        rows = [list(row) for row in zip(queries.queries, queries.recall, queries.box_recall, strict=True)]
        columns = [Column("queries"), Column("recall"), Column("recall of boxes", meaning="with any class")]
        table = Table("Recall over the number of queries that are kept", columns, rows)
        parts += [Heading("Queries"), Row([*plot_parts(plots, "queries"), table])]
    return parts


def _bins(caption: str, title: str, meaning: str, bins: Sequence[Bin]) -> Table:
    columns = [Column(title, 2, meaning), Column("up to", 2), Column("objects"), Column("AP"), Column("AP50")]
    rows = [
        [each.low, each.high, each.objects, *(known(value) for value in (each.ap, each.ap50, each.ar100))]
        for each in bins
    ]
    return Table(caption, [*columns, Column("AR100")], rows)


def _images(analysis: Analysis, drawn: Mapping[str, Sequence[ImageFile]]) -> list[Part]:
    parts: list[Part] = [
        Heading("Images"),
        Text(f"At the threshold {analysis.thresholds.best.threshold:.3f} and IoU 0.5. {COLOURS}"),
    ]
    shown: set[int] = set()
    for name, text, results in (
        ("worst", "Lowest F1", analysis.worst),
        ("most_missed", "Most missed objects", analysis.most_missed),
    ):
        parts.append(Heading(text, 3))
        above = [result.image_id for result in results if result.image_id in shown]
        if above:
            parts.append(Text(f"Shown above: {', '.join(map(str, above))}."))
        if drawn.get(name):
            parts.append(Row(drawn[name]))
        elif name not in drawn:
            parts.append(_list_images(text, results))
        shown |= {result.image_id for result in results}
    return parts


def _list_images(text: str, results: Sequence[ImageResult]) -> Table:
    rows: list[list[Cell]] = [[str(each.image_id), describe(each)] for each in results]
    return Table(text, [Column("image"), Column("detections")], rows)
