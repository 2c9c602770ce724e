"""The parts of a page, as plain values. They hold text, never HTML; `render.py` escapes them. Never fails.

A caller builds a `Page` from parts and needs to know nothing of HTML. Numbers keep their full precision in the page and
are shown with the digits of their column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

Cell: TypeAlias = str | int | float | None  # None and NaN: there is no value


@dataclass(frozen=True)
class Heading:
    """A heading; those of level 2 are also the page's list of contents."""

    kind: ClassVar = "heading"
    text: str
    level: int = 2  # 2 or 3


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    text: str
    warning: bool = False  # shown in a frame


@dataclass(frozen=True)
class Code:
    """Commands or file content in a fixed-width font."""

    kind: ClassVar = "code"
    text: str


@dataclass(frozen=True)
class Facts:
    """Names with their values, as a list; values are shown as they are."""

    kind: ClassVar = "facts"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    digits: int = 3  # after the decimal point, of numbers that are not integers
    meaning: str = ""  # explained below the table
    significant: bool = False  # `digits` counts from the first one that is not zero, as for learning rates


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort by any column; rows without a value there are last.

    `sorted_by` names the column that the rows are already sorted by, ascending; None: none.
    """

    kind: ClassVar = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    sorted_by: int | None = None


@dataclass(frozen=True)
class Plot:
    """A drawing as SVG, from `figures.to_svg`; it takes the colours of the page."""

    kind: ClassVar = "plot"
    svg: str
    caption: str
    description: str  # what it shows, for readers who do not see it


@dataclass(frozen=True)
class ImageFile:
    """An image file, PNG or JPEG, with parts that are shown when the reader opens them."""

    kind: ClassVar = "image"
    data: bytes
    size: tuple[int, int]  # width, height in pixels
    caption: str
    description: str  # what it shows, for readers who do not see it
    details: Sequence["Part"] = ()


@dataclass(frozen=True)
class Row:
    """Parts beside each other, below each other on a narrow screen."""

    kind: ClassVar = "row"
    parts: Sequence["Part"]


@dataclass(frozen=True)
class Details:
    """Parts that are hidden until the reader opens them."""

    kind: ClassVar = "details"
    summary: str
    parts: Sequence["Part"]


@dataclass(frozen=True)
class GalleryItem:
    """Images that belong together, side by side, and what a reader can choose them by."""

    caption: str
    images: Sequence[ImageFile]
    values: Sequence[Sequence[str]]  # for each filter of the gallery, those of its values that hold for this item


@dataclass(frozen=True)
class Gallery:
    """Items of which a reader can show those with a value, such as a class; all are shown at first."""

    kind: ClassVar = "gallery"
    title: str  # what it holds, for readers who do not see it
    filters: Sequence[tuple[str, Sequence[str]]]  # names with their values
    items: Sequence[GalleryItem]


Part: TypeAlias = Heading | Text | Code | Facts | Table | Plot | ImageFile | Row | Details | Gallery


@dataclass(frozen=True)
class Page:
    """A page."""

    title: str
    parts: Sequence[Part]
