"""What a page shows, read from its HTML."""

from html.parser import HTMLParser

Row = dict[str, str | float | None]


class _Tables(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[Row]] = {}
        self._inside: list[str] = []
        self._caption = ""
        self._columns: list[str] = []
        self._cells: list[str | float | None] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside.append(tag)
        if tag == "table":
            self._caption, self._columns = "", []
        elif tag == "tr":
            self._cells = []
        elif tag == "th":
            self._columns.append("")
        elif tag == "td":
            given = dict(attributes)
            value = given.get("data-value")
            self._cells.append(float(value) if value is not None and given.get("class") == "number" else value)

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "caption":
            self._caption += data
        elif self._inside and self._inside[-1] == "button" and self._columns:
            self._columns[-1] += data

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass
        if tag == "caption":
            self.found[self._caption] = []
        elif tag == "tr" and self._cells:
            self.found[self._caption].append(dict(zip(self._columns, self._cells, strict=True)))


def tables_of(html: str) -> dict[str, list[Row]]:
    """Rows of each table by its caption; numbers in full precision, None where there is no value."""
    parser = _Tables()
    parser.feed(html)
    return parser.found
