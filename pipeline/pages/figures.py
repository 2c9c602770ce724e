"""Plots by matplotlib, as SVG in the colours of a page and as PNG files. A file that cannot be written is an OSError.

A plot is a function that draws into an empty figure. `to_svg` draws it with text as text, with the ink as
`currentColor` and PAPER as the page's own colour, so that one SVG serves a light and a dark page. Text is never read as
a formula.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.pages.parts import Plot

Draw = Callable[[Figure], None]
SIZE = (5.2, 3.6)  # inches
DPI = 120
INK = "#010203"  # stands for the colour of the page's text
PAPER = "#fefdfc"  # stands for the colour behind the text
# After Okabe and Ito: distinguishable for most readers, with a contrast of at least 3 on white and on black
SERIES = ("#2f7fc1", "#d55e00", "#0d9373", "#b8559a", "#8a7a00", "#7a6fd0")
GREY = "#808080"
STYLE = {
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.facecolor": "none",
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,
}
COLOURED = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
NAME_LETTERS = 22


@dataclass(frozen=True)
class Drawing:
    """A plot with what a page says about it."""

    draw: Draw
    caption: str
    description: str  # in words, for readers who do not see it
    size: tuple[float, float] = SIZE  # inches


def to_plot(drawing: Drawing) -> Plot:
    """The plot as a part of a page."""
    return Plot(to_svg(drawing.draw, drawing.size), drawing.caption, f"{drawing.caption}. {drawing.description}")


def shorten(name: str, letters: int = NAME_LETTERS) -> str:
    """At most `letters` letters of a name, without line breaks."""
    name = " ".join(name.split())
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def to_svg(draw: Draw, size: tuple[float, float] = SIZE) -> str:
    """The plot as an `<svg>` element, without declaration and metadata.

    Args:
        draw: draws into an empty figure.
        size: width and height in inches.
    """
    with _figure(draw, size, INK) as figure:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :].strip().replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    return _with_own_names(svg)


def to_png(draw: Draw, size: tuple[float, float] = SIZE) -> bytes:
    """The plot as a PNG file, black on white; arguments as of `to_svg`."""
    with _figure(draw, size, "black") as figure:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


@contextmanager
def _figure(draw: Draw, size: tuple[float, float], ink: str) -> Iterator[Figure]:
    settings = {**STYLE, **dict.fromkeys(COLOURED, ink), "grid.color": GREY}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)  # a browser has more fonts
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        yield figure


def _with_own_names(svg: str) -> str:
    """The SVG with ids that no other SVG of a page has, because references go through the whole page."""
    prefix = f"s{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
