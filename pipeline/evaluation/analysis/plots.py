"""The plots of an analysis, as functions that draw into an empty figure; `pipeline.pages.figures` makes files of them.

What is drawn is in the tables of the page, too. Never fails.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipeline.evaluation.analysis.result import Analysis, Bin, CategoryResult, Difference
from pipeline.pages.figures import GREY, SERIES, SIZE, Drawing, shorten

SHOWN_CLASSES = 20  # of a plot of bars
MATRIX_CLASSES = 30  # classes with the most errors that have their own row and column
NUMBERED_CLASSES = 12  # so many classes leave room for numbers in the matrix


def plots_of(analysis: Analysis) -> dict[str, Drawing]:
    """The plots of an analysis by the names of their files; those without data are left out."""
    classes = [each for each in analysis.categories if each.ap.value >= 0]
    found = {
        "errors": Drawing(
            partial(_draw_errors, analysis), "What each cause of errors costs in AP50", _describe_errors(analysis)
        ),
        "thresholds": Drawing(
            partial(_draw_thresholds, analysis),
            "Precision, recall and F1 of all classes over the lowest score that is kept",
            f"F1 is highest, {analysis.thresholds.best.f1:.3f}, at score {analysis.thresholds.best.threshold:.3f}",
        ),
        "sizes": _plot_bins(analysis.sizes, "side of the object in pixels", "size"),
        "aspect_ratios": _plot_bins(analysis.aspect_ratios, "width / height of the object's box", "aspect ratio"),
    }
    if classes:
        shown = sorted(classes, key=lambda each: each.ap.value)[:SHOWN_CLASSES]
        caption = f"AP of the {len(shown)} classes with the lowest AP" if len(classes) > len(shown) else "AP per class"
        caption += _with_intervals(analysis)
        height = 1.2 + 0.24 * len(shown)
        lowest = f"lowest: {shown[0].name}, {shown[0].ap.value:.3f}"
        found["classes"] = Drawing(partial(_draw_classes, shown), caption, lowest, (SIZE[0], height))
    if analysis.confusion.category_ids:
        labels, counts = shown_confusion(analysis)
        side = 2.8 + 0.15 * len(labels)
        description = "Rows are objects, columns detections; the most frequent confusions are in the table"
        draw = partial(_draw_confusion, labels, counts)
        found["confusion"] = Drawing(draw, "Confusion of classes, as shares of each row", description, (side, side))
    if analysis.queries is not None:
        last = f"{analysis.queries.recall[-1]:.3f} with {analysis.queries.queries[-1]} queries"
        caption = "Recall over the number of queries that are kept, best first"
        found["queries"] = Drawing(partial(_draw_queries, analysis), caption, last)
    if analysis.comparison is not None:
        caption = "Differences to the other model" + _with_intervals(analysis)
        draw = partial(_draw_differences, analysis.comparison.metrics)
        found["differences"] = Drawing(draw, caption, "The numbers are in the table")
    return found


def shown_confusion(analysis: Analysis) -> tuple[list[str], NDArray[np.int64]]:
    """Labels [n] and counts [n, n] of the matrix that is drawn.

    Of many classes those with the most errors have their own row and column. Then come all other classes together, and
    the background.
    """
    confusion = analysis.confusion
    counts, names = np.array(confusion.counts, np.int64), names_of(analysis)
    order = np.arange(len(confusion.category_ids))
    if len(order) > MATRIX_CLASSES:
        total = counts.sum(0)[:-1] + counts.sum(1)[:-1]
        wrong = total - 2 * counts.diagonal()[:-1]
        ordered = np.lexsort((-total, -wrong))
        own = np.sort(ordered[total[ordered] > 0][:MATRIX_CLASSES])
        groups = [*([k] for k in own), np.setdiff1d(order, own).tolist(), [len(order)]]
        labels = [names[confusion.category_ids[k]] for k in own] + [f"{len(order) - len(own)} others"]
        merged = [[counts[np.ix_(rows, columns)].sum() for columns in groups] for rows in groups]
        return [*labels, "background"], np.array(merged)
    return [*(names[category] for category in confusion.category_ids), "background"], counts


def names_of(analysis: Analysis) -> Mapping[int, str]:
    """Names of the categories by id."""
    return {each.id: each.name for each in analysis.categories}


def shares_of_rows(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Counts divided by the sum of their row; 0 in rows without counts."""
    shares: NDArray[np.float64] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def show_range(bin_: Bin) -> str:
    """A bin's range as text."""
    low = f"{bin_.low:,.4g}"
    return f"from {low}" if bin_.high is None else f"{low} to {bin_.high:,.4g}"


def _with_intervals(analysis: Analysis) -> str:
    return f", with {analysis.level:.0%} intervals" if analysis.draws else ""


def _plot_bins(bins: Sequence[Bin], axis: str, what: str) -> Drawing:
    described = "; ".join(f"{show_range(each)}: {each.ap:.3f}" for each in bins if each.ap >= 0)
    return Drawing(partial(_draw_bins, bins, axis), f"AP over {what}", described or "no objects")


def _describe_errors(analysis: Analysis) -> str:
    return "; ".join(f"{each.cause}: {each.ap_cost:.3f}" for each in analysis.errors.costs)


def _draw_errors(analysis: Analysis, figure: Figure) -> None:
    axes = figure.add_subplot(xlabel="AP50 that would be gained")
    costs = analysis.errors.costs[::-1]
    bars = axes.barh([each.cause for each in costs], [each.ap_cost for each in costs], color=SERIES[1])
    axes.bar_label(bars, [f" {each.ap_cost:.3f}" for each in costs])
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)


def _draw_classes(shown: Sequence[CategoryResult], figure: Figure) -> None:
    axes = figure.add_subplot(xlabel="AP", xlim=(0, 1))
    shown = shown[::-1]
    places = range(len(shown))
    axes.barh(places, [each.ap.value for each in shown], color=SERIES[0])
    for place, each in zip(places, shown, strict=True):
        if each.ap.interval:
            axes.plot([each.ap.interval.low, each.ap.interval.high], [place, place], color=GREY, linewidth=2.5)
    axes.set_yticks(places, [shorten(each.name) for each in shown])
    axes.grid(axis="y", visible=False)


def _draw_confusion(labels: Sequence[str], counts: NDArray[np.int64], figure: Figure) -> None:
    axes = figure.add_subplot(xlabel="detection", ylabel="object")
    shares = shares_of_rows(counts)
    # Transparency instead of a colour map, so that a cell without counts has the colour of the page.
    colours = np.concatenate([np.broadcast_to(to_rgb(SERIES[0]), (*shares.shape, 3)), shares[..., None]], axis=2)
    axes.imshow(colours, interpolation="nearest")
    small = 8 if len(labels) > NUMBERED_CLASSES else 10
    names = [shorten(label) for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=90, fontsize=small)
    axes.set_yticks(range(len(labels)), names, fontsize=small)
    axes.grid(visible=False)
    if len(labels) <= NUMBERED_CLASSES + 1:
        for row, column in np.argwhere(counts > 0):
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8)


def _draw_thresholds(analysis: Analysis, figure: Figure) -> None:
    axes = figure.add_subplot(xlabel="lowest score that is kept", xlim=(0, 1), ylim=(0, 1.02))
    curve = analysis.thresholds
    for colour, name in zip(SERIES, ("precision", "recall", "f1"), strict=False):
        axes.plot(curve.thresholds, getattr(curve, name), color=colour, label="F1" if name == "f1" else name)
    axes.axvline(curve.best.threshold, color=GREY, linestyle="--", label=f"highest F1, {curve.best.f1:.3f}")
    axes.legend(loc="best")


def _draw_bins(bins: Sequence[Bin], label: str, figure: Figure) -> None:
    axes = figure.add_subplot(xlabel=label, ylabel="AP", ylim=(0, 1.08))
    known = [(place, each) for place, each in enumerate(bins) if each.ap >= 0]
    bars = axes.bar([place for place, _ in known], [each.ap for _, each in known], color=SERIES[0])
    axes.bar_label(bars, [f"{each.objects:,}" for _, each in known], fontsize=8)
    axes.set_xticks(range(len(bins)), [show_range(each) for each in bins], rotation=35, ha="right", fontsize=8)
    axes.set_title("above each bar: number of objects", fontsize=8)
    axes.grid(axis="x", visible=False)


def _draw_queries(analysis: Analysis, figure: Figure) -> None:
    axes = figure.add_subplot(xlabel="queries", ylabel="recall", ylim=(0, 1.02))
    queries = analysis.queries
    assert queries is not None, "drawn only with queries"
    axes.plot(queries.queries, queries.recall, color=SERIES[0], marker="o", markersize=3, label="class and box")
    axes.plot(queries.queries, queries.box_recall, color=SERIES[1], marker="o", markersize=3, label="box alone")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="lower right")


def _draw_differences(metrics: Mapping[str, Difference], figure: Figure) -> None:
    axes: Axes = figure.add_subplot(xlabel="this model minus the other")
    known = [(name, each) for name, each in metrics.items() if each.value >= 0 and each.other >= 0][::-1]
    places = range(len(known))
    axes.axvline(0, color=GREY, linewidth=1)
    for place, (_, each) in zip(places, known, strict=True):
        if interval := each.difference.interval:
            axes.plot([interval.low, interval.high], [place, place], color=GREY, linewidth=2.5)
    axes.plot([each.difference.value for _, each in known], places, "o", color=SERIES[0])
    axes.set_yticks(places, [name for name, _ in known])
