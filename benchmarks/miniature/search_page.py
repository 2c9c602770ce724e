"""The comparison of samplers as a table and a plot; AP in percent."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.miniature.plots import DPI
from benchmarks.miniature.replay import SAMPLERS, Comparison, RecordedTrial
from benchmarks.miniature.tables import NOT_RUN
from tune.search.tpe import STARTUP_POINTS

PLOT = "images/findings_tpe.png"  # relative to docs/
SHOWN = (1, 5, 10, 12, 15, 20)  # numbers of trials in the table
TITLES = {"random": "random", "tpe": "TPE"}
WIDTH = 120  # of lines of text
COLOURS = {"random": "#9aa5b1", "tpe": "#c0392b"}


def search_section(trials: Sequence[RecordedTrial], comparison: Comparison | None, seeds: int) -> str:
    """The table for docs/findings.md; without a comparison it says that there are too few trials."""
    if comparison is None:
        return f"{NOT_RUN}: {len(trials)} trials are recorded, which is fewer than one search needs"
    scores = sorted((trial.score for trial in trials), reverse=True)
    length = len(comparison.mean["tpe"])
    shown = [number for number in SHOWN if number <= length]
    lines = [
        f"{len(trials)} recorded trials: AP {100 * scores[-1]:.1f} to {100 * scores[0]:.1f}, "
        f"median {100 * statistics.median(scores):.1f}. Best AP after so many trials, mean ± spread of {seeds} seeds:",
        "",
        f"| trials | {' | '.join(map(str, shown))} |",
        f"|{'---|' * (len(shown) + 1)}",
    ]
    for name in SAMPLERS:
        cells = [
            f"{100 * comparison.mean[name][at - 1]:.1f} ± {100 * comparison.spread[name][at - 1]:.1f}" for at in shown
        ]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    wins, losses, guided = comparison.wins, comparison.losses, comparison.guided
    outcome = (
        f"After {length} trials TPE has the better trial in {wins} of {seeds} seeds, random search in {losses}; in the "
        f"others both have the same one. Two equal samplers would differ as much with probability "
        f"{sign_test(wins, losses):.2f} (sign test). TPE draws its first {STARTUP_POINTS} trials at random. "
        f"The mean AP of the trials after them is {100 * guided['tpe']:.1f} with TPE and "
        f"{100 * guided['random']:.1f} with random search."
    )
    lines += ["", f"![Best AP so far of both samplers]({PLOT})", "", *textwrap.wrap(outcome, WIDTH)]
    return "\n".join(lines)


def sign_test(wins: int, losses: int) -> float:
    """Probability that two equal samplers differ in at least as many seeds, in either direction."""
    decided = wins + losses
    tail = sum(math.comb(decided, each) for each in range(max(wins, losses), decided + 1))
    return min(1.0, 2 * tail / 2**decided)


def search_plot(comparison: Comparison, trials: Sequence[RecordedTrial], path: Path) -> None:
    """Mean of the best AP so far over the trials, with a band of one spread to each side."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot(xlabel="trials", ylabel="best COCO AP so far, %")
    for name in SAMPLERS:
        middle = [100 * value for value in comparison.mean[name]]
        spread = [100 * value for value in comparison.spread[name]]
        places = range(1, len(middle) + 1)
        axes.plot(places, middle, color=COLOURS[name], label=TITLES[name])
        low = [value - half for value, half in zip(middle, spread, strict=True)]
        high = [value + half for value, half in zip(middle, spread, strict=True)]
        axes.fill_between(places, low, high, color=COLOURS[name], alpha=0.2)
    best = 100 * max(trial.score for trial in trials)
    axes.axhline(best, color="black", linewidth=0.8, linestyle=":", label="best recorded trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)  # a spread reaches below, an AP does not
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=DPI)
