"""The plots of a sweep, as functions that draw into an empty figure; `pipeline.pages.figures` makes files of them.

What is drawn is in the tables of the page, too. They never fail.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.pages.figures import GREY, PAPER, SERIES, SIZE, Drawing, shorten
from tune.results.curves import Curve, find_curves
from tune.results.importance import Importance
from tune.results.listing import show_value
from tune.results.outcomes import Outcome, rank
from tune.results.source import Results
from tune.space import Axis, Space

DASHES = ("-", "--", ":", "-.")  # after the colours are used up
WIDE = (5.6, 4.2)  # inches
TICKS = 4  # of an axis with a range
TEXT_LETTERS = 60  # that fit beside each other below an axis
LEGEND_LETTERS = 28
MARKED = 3  # best points with their own colour among the values


def plots_of(results: Results, importance: Importance) -> dict[str, Drawing]:
    """The plots by the names of their files; those without data are left out."""
    outcomes = results.outcomes
    metric = results.space.search.metric
    found = {}
    if curves := find_curves(results.space, results.ledger, outcomes):
        repeated = " (mean, and the standard deviation over the repeats as an area)" * any(
            any(curve.spreads) for curve in curves
        )
        others = " Points in grey are behind them." if any(not curve.group for curve in curves) else ""
        drops = " After a circle the learning rates dropped." if any(curve.drops for curve in curves) else ""
        ends = " A cross ends a curve that was stopped early or failed." if any(c.stopped for c in curves) else ""
        caption = f"{metric} over epochs{repeated}.{drops}{ends}{others}"
        found["curves"] = Drawing(
            partial(_draw_curves, curves, metric), caption, f"Best at its last epoch: {curves[0].name}", WIDE
        )
    if importance.shares:
        described = "; ".join(f"{label}: {share:.0%}" for label, share in importance.shares.items())
        size = (SIZE[0], 1.1 + 0.35 * len(importance.shares))
        found["importance"] = Drawing(
            partial(_draw_importance, importance.shares), "Importance of the settings", described, size
        )
    scored = [outcome for outcome in rank(outcomes) if outcome.score is not None]
    if len(scored) > 1:
        best = f"best: {', '.join(outcome.name for outcome in scored[:MARKED])}"
        caption = (
            f"The values of all points with a score. The {min(MARKED, len(scored))} best have colours; among the "
            f"others those with a high {metric} are clearer."
        )
        size = (WIDE[0], 0.8 + 0.75 * (len(results.space.axes) + 1))
        found["values"] = Drawing(partial(_draw_values, results.space, scored), caption, best, size)
    return found


def _draw_curves(curves: Sequence[Curve], metric: str, figure: Figure) -> None:
    axes = figure.add_subplot(xlabel="epochs", ylabel=metric)
    groups = list(dict.fromkeys(curve.group for curve in curves if curve.group))
    styles: dict[str, dict[str, Any]] = {
        group: {"color": SERIES[k % len(SERIES)], "linestyle": DASHES[k // len(SERIES) % len(DASHES)]}
        for k, group in enumerate(groups)
    }
    for curve in reversed(curves):  # the best ones on top
        style = styles.get(curve.group, {"color": GREY})
        weak = not (curve.group and curve.best)
        look: dict[str, Any] = {"alpha": 0.45, "linewidth": 1} if weak else {"linewidth": 1.8}
        marker = "o" if len(curve.epochs) == 1 else None
        axes.plot(curve.epochs, curve.means, marker=marker, markersize=3, **style, **look)
        if curve.stopped:
            axes.plot(curve.epochs[-1:], curve.means[-1:], "x", color=style["color"], alpha=look.get("alpha", 1))
        if curve.drops and not weak:
            means = [curve.means[curve.epochs.index(epoch)] for epoch in curve.drops]
            axes.plot(curve.drops, means, "o", color=style["color"], markersize=6, fillstyle="none")
        if any(curve.spreads) and not weak:
            low = [mean - spread for mean, spread in zip(curve.means, curve.spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(curve.means, curve.spreads, strict=True)]
            axes.fill_between(curve.epochs, low, high, color=style["color"], alpha=0.18, linewidth=0)
    for group in groups:  # in the order of the ranking
        axes.plot([], [], label=_legend_text(group), **styles[group])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if max(max(curve.epochs) for curve in curves) == 1:
        axes.set_xlim(0.5, 1.5)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if groups:
        figure.legend(loc="outside lower center", ncols=_columns(groups))


def _draw_importance(shares: Mapping[str, float], figure: Figure) -> None:
    axes = figure.add_subplot(xlabel="share", xlim=(0, 1.12))
    names = [_break(label) for label in shares][::-1]
    values = list(shares.values())[::-1]
    bars = axes.barh(names, values, color=SERIES[0])
    axes.bar_label(bars, [f"{share:.0%}" for share in values], padding=4)
    axes.grid(axis="y", visible=False)


def _draw_values(space: Space, scored: Sequence[Outcome], figure: Figure) -> None:
    """Parallel coordinates: a horizontal axis for each setting and the score below them; a line for each point."""
    axes = figure.add_subplot(xlim=(-0.02, 1.02), ylim=(len(space.axes) + 0.3, -0.45))
    scores = [outcome.score or 0.0 for outcome in scored]
    low, high = min(scores), max(scores)
    scale = high - low or 1.0
    for row, axis in enumerate(space.axes):
        _draw_axis(axes, row, _break(axis.label).replace("\n", " "), _ticks(axis))
    _draw_axis(axes, len(space.axes), space.search.metric, [(k / 3, f"{low + k / 3 * scale:.3f}") for k in range(4)])
    for place, outcome in reversed(list(enumerate(scored))):
        share = ((outcome.score or 0.0) - low) / scale
        across = [*(_place(axis, outcome.values[axis.label], place) for axis in space.axes), share]
        if place < MARKED:
            look: dict[str, Any] = {
                "color": SERIES[place],
                "linewidth": 2.2 - 0.4 * place,
                "label": _legend_text(outcome.name),
            }
        else:
            look = {"color": GREY, "linewidth": 0.9, "alpha": 0.15 + 0.65 * share**2}
        axes.plot(across, range(len(across)), **look)
    axes.axis("off")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=_columns(labels))


def _draw_axis(axes: Axes, row: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([0, 1], [row, row], color=GREY, linewidth=1, alpha=0.6)
    behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 1, "alpha": 0.85}  # lines pass here
    axes.text(0, row - 0.17, name, fontsize=9, fontweight="bold", va="bottom", bbox=behind)
    room = TEXT_LETTERS // max(1, len(ticks))
    lines = 2 if any(len(text) > room for _, text in ticks) else 1  # neighbours on different lines have more room
    for number, (place, text) in enumerate(ticks):
        axes.plot([place, place], [row - 0.05, row + 0.05], color=GREY, linewidth=1)
        side = "left" if place < 0.02 else "right" if place > 0.98 else "center"
        down = row + 0.08 + 0.17 * (number % lines)
        axes.text(place, down, shorten(text, max(4, room * lines)), fontsize=8, ha=side, va="top", bbox=behind)


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    """Places from 0 to 1, and their texts."""
    domain = axis.domain
    if domain.values is not None:
        return [(_share(k, len(domain.values)), show_value(value)) for k, value in enumerate(domain.values)]
    low, high = domain.bounds
    if domain.randint is not None:
        high -= 1
    places = [k / (TICKS - 1) for k in range(TICKS)]
    if domain.loguniform:
        return [(place, f"{low * (high / low) ** place:.2g}") for place in places]
    return [(place, f"{low + place * (high - low):.3g}") for place in places]


def _place(axis: Axis, value: Any, place: int) -> float:
    """Where a value is on its axis, from 0 to 1; equal listed values lie a little beside each other."""
    domain = axis.domain
    if domain.values is not None:
        beside = ((place * 7) % 11 - 5) / 5 * min(0.025, 0.2 / len(domain.values))
        return _share(domain.values.index(value), len(domain.values)) + beside
    low, high = domain.bounds
    if domain.loguniform:
        return math.log(value / low) / math.log(high / low)
    return float((value - low) / max(high - low - (domain.randint is not None), 1e-300))


def _legend_text(name: str) -> str:
    """A name for a legend; matplotlib leaves out those that begin with an underscore."""
    return shorten(f"\u200b{name}" if name.startswith("_") else name, LEGEND_LETTERS)


def _columns(names: Sequence[str]) -> int:
    """How many names fit beside each other in a legend."""
    longest = max(map(len, names))
    return 3 if longest <= 12 else 2 if longest <= 22 else 1


def _share(number: int, count: int) -> float:
    return (number + 0.5) / count


def _break(label: str) -> str:
    """The label of joined settings on several lines."""
    return label.replace(", ", ",\n")
