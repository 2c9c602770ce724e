"""From the parts of a page to its HTML: one file, which needs nothing else and requests nothing.

Jinja2 escapes every text; MLflow and torch need it anyway. The content security policy in the page is a second
guard: a browser runs only the page's own script, which it knows by its digest, and sends no request. Characters that
cannot be seen but change how others are shown (U+202E, ...) are replaced. Raises ValueError for data that is neither
PNG nor JPEG.
"""

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from pipeline.pages.parts import Cell, Column, Heading, Page, Part, Table

FOLDER = Path(__file__).parent
KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
# C0 and C1 except tab and line feed, marks and overrides of the writing direction, halves of surrogate pairs
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MISSING = "–"


def render(page: Page) -> str:
    """The HTML of a page, to be written as UTF-8."""
    style, script = Markup(read_style()), Markup((FOLDER / "page.js").read_text("utf-8").strip())
    digest = script_digest(script)
    numbered = _numbered(page.parts)
    contents = [(anchor, part.text) for anchor, part in numbered if isinstance(part, Heading) and part.level == 2]
    html = _template().render(
        page=page, numbered=numbered, contents=contents, style=style, script=script, script_digest=digest
    )
    return html.lstrip()


def read_style() -> str:
    """The style of all pages, as CSS."""
    return (FOLDER / "page.css").read_text("utf-8").strip()


def script_digest(script: str) -> str:
    """SHA-256 of a page's script, as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def clean(value: Any) -> Any:
    """Text with a visible sign (U+FFFD) for each of the INVISIBLE characters; other values unchanged."""
    return INVISIBLE.sub("�", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def show(cell: Cell, column: Column) -> str:
    """The text of a cell."""
    if not has_value(cell):
        return MISSING
    if isinstance(cell, float):
        return f"{cell:.{column.digits}g}" if column.significant else f"{cell:,.{column.digits}f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def has_value(cell: Cell) -> bool:
    """Whether a cell has a value: neither None nor NaN."""
    return cell is not None and not (isinstance(cell, float) and math.isnan(cell))


def numeric_columns(table: Table) -> list[bool]:
    """Of each column whether it has numbers only; they are aligned to the right and sorted as numbers."""
    return [all(not isinstance(row[k], str) for row in table.rows) for k in range(len(table.columns))]


def places(known: Sequence[str], own: Sequence[str]) -> str:
    """The places of some values among the known ones, as an attribute."""
    return " ".join(str(known.index(value)) for value in own)


def data_uri(data: bytes) -> str:
    """An image file as an address that contains it. Raises ValueError: neither PNG nor JPEG."""
    for start, kind in KINDS.items():
        if data.startswith(start):
            return f"data:{kind};base64,{base64.b64encode(data).decode()}"
    raise ValueError(f"an image that begins with {data[:8]!r} is neither PNG nor JPEG")


def _numbered(parts: Sequence[Part]) -> list[tuple[str, Part]]:
    return [(f"part-{number}", part) for number, part in enumerate(parts, 1)]


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "show": show,
        "has_value": has_value,
        "numeric_columns": numeric_columns,
        "data_uri": data_uri,
        "places": places,
    }
    environment.globals |= {"numbered_parts": _numbered, "safe_svg": lambda svg: Markup(clean(svg))}
    return environment.get_template("page.html")
