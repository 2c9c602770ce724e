"""Cells and parts that several sections of the page of an analysis have. Never fails."""

from collections.abc import Mapping

from pipeline.evaluation.analysis.result import Analysis, Comparison, Estimate, Interval
from pipeline.pages.figures import Drawing, to_plot
from pipeline.pages.parts import Cell, Plot


def known(value: float) -> float | None:
    """The number, or None for pycocotools' -1: there is no such object."""
    return None if value < 0 else value


def estimate_cells(estimate: Estimate) -> list[Cell]:
    """Value and both ends of its interval."""
    return [known(estimate.value), *interval_cells(estimate.interval)]


def interval_cells(interval: Interval | None) -> tuple[Cell, Cell]:
    """Both ends of an interval."""
    return (interval.low, interval.high) if interval else (None, None)


def plot_parts(plots: Mapping[str, Drawing], name: str) -> list[Plot]:
    """The plot of this name; none if it was left out."""
    return [to_plot(plots[name])] if name in plots else []


def explain_intervals(analysis: Analysis | Comparison) -> str:
    """What the columns low and high are; nothing without draws."""
    if not analysis.draws:
        return ""
    return (
        f" Low and high are the ends of {analysis.level:.0%} intervals, from {analysis.draws} draws of the images with "
        f"replacement (seed {analysis.seed}). They say how far a number moves with another choice of images."
    )
