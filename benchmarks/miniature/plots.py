"""Plots of the findings: AP over epochs, as the paper's Figure 2, and the ablation's rows beside the paper's.

A plot of rows that have not run says so. It uses matplotlib's file backend only.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from benchmarks.miniature.results import Recorded
from benchmarks.miniature.rows import GROUPS, ROWS
from benchmarks.miniature.tables import NOT_RUN, Results
from pipeline.presets.published import find_published

DPI = 110
PANELS = {"AP": "COCO AP", "AP_small": "AP of small objects"}
COLOURS = {"deformable": "#c0392b", "detr_10x": "#2c6fbb", "detr": "#7fb2e5"}


def convergence_plot(results: Results, path: Path) -> None:
    """AP over epochs of Deformable DETR and of DETR with both lengths; the band spans the seeds."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for name, colour in COLOURS.items():
            _draw_curve(axes, name, results[name], metric, colour)
        axes.set(xscale="log", xlabel="epochs", ylabel=f"{label}, %")
        axes.xaxis.set_major_locator(FixedLocator([2, 4, 6, 10, 20, 40, 60]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=DPI)


def ablation_plot(results: Results, path: Path) -> None:
    """AP of the rows of Table 2: a bar here, with a dot for each seed, and a dot in the paper."""
    names = GROUPS["b"].rows
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    ours, theirs = figure.subplots(1, 2, sharey=True)
    for place, name in enumerate(names):
        found, colour = results[name], COLOURS["deformable"] if name == "deformable" else "#9aa5b1"
        values = [100 * each["AP"] for each in found]
        if values:
            ours.barh(place, statistics.mean(values), color=colour)
            ours.plot(values, [place] * len(values), "k.", markersize=4)
        else:
            ours.text(0.02, place, NOT_RUN, transform=ours.get_yaxis_transform(), va="center", fontsize=8)
        published = find_published(ROWS[name].preset).ap
        if published is not None:  # as a dot, because a bar that does not start at 0 misleads
            theirs.plot([published], [place], "o", color=colour)
            theirs.annotate(f"{published}", (published, place), (6, 0), textcoords="offset points", va="center")
    ours.set_yticks(range(len(names)), [SHORT[name] for name in names], fontsize=8)
    ours.invert_yaxis()
    ours.set(title="here", xlabel="COCO AP, %; a dot is a seed")
    theirs.set(title="in the paper", xlabel="COCO AP, %", xlim=(39, 45))
    for axes in (ours, theirs):
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=DPI)


SHORT = {
    "single_scale_k1": "one scale, K = 1",
    "own_level_k1": "multi-scale inputs, K = 1",
    "own_level_k4": "multi-scale inputs, K = 4",
    "deformable": "+ multi-scale attention",
    "fpn": "+ FPN",
    "bifpn": "+ BiFPN",
}


def _draw_curve(axes: Axes, name: str, found: Sequence[Recorded], metric: str, colour: str) -> None:
    title = ROWS[name].title.partition(":")[0]
    if not found:
        axes.plot([], [], color=colour, label=f"{title} ({NOT_RUN})")
        return
    curves = [{point["epoch"]: 100 * max(0.0, point[metric]) for point in each["curve"]} for each in found]
    epochs = sorted(set.intersection(*map(set, curves)))  # evaluated with every seed
    values = [[curve[epoch] for epoch in epochs] for curve in curves]
    middle = [statistics.mean(column) for column in zip(*values, strict=True)]
    axes.plot(epochs, middle, color=colour, marker="o", markersize=3, label=title)
    lowest, highest = ([pick(column) for column in zip(*values, strict=True)] for pick in (min, max))
    axes.fill_between(epochs, lowest, highest, color=colour, alpha=0.2)
