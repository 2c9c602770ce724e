"""The table of the presets as text, Markdown or JSON; pure functions of `rows.Row` that never fail."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from pipeline.presets.published import Published
from pipeline.presets.rows import Row

HEADER = ("preset", "row", "epochs", "params M", "paper", "GFLOPs", "paper", "ratio", "FPS", "AP", "AP here")
NOTES = (
    "row: table of the paper (code: read-me of the released code) and its row; paper: figures printed there.",
    "params M: millions, trainable + frozen.",
    "GFLOPs: thousand millions of multiply-adds of convolutions, matrix products, attention and sampling per image, "
    "mean over real val2017 sizes at the evaluation size; the paper's are a mean over other val2017 images.",
    "AP: of val2017, in percent; code: of the released weights; test-dev: not val2017.",
)


def as_text(rows: Sequence[Row], markdown: bool = False) -> str:
    """The table and its notes; as Markdown, or with columns of equal width."""
    table = [HEADER, *(_cells(row) for row in rows)]
    if markdown:
        lines = [f"| {' | '.join(cells)} |" for cells in table]
        lines.insert(1, "|" + "---|" * len(HEADER))
        return "\n".join([*lines, "", *(f"- {note}" for note in NOTES)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table
    ]
    return "\n".join([*lines, "", *NOTES])


def as_json(rows: Sequence[Row]) -> str:
    """A list with one object per preset; what is not known is null."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def _cells(row: Row) -> tuple[str, ...]:
    published = row.published
    table = {"": "", "code": "code: "}.get(published.table, f"{published.table}: ")
    return (
        row.preset,
        f"{table}{published.row}" or "-",
        _number(published.epochs, ".0f"),
        f"{row.trainable / 1e6:.1f} + {(row.parameters - row.trainable) / 1e6:.1f}",
        _number(published.params, ".0f"),
        f"{row.gflops:.1f}",
        _number(published.gflops, ".0f"),
        _number(published.gflops and row.gflops / published.gflops, ".3f"),
        _number(row.fps, ".2f"),
        _published_ap(published),
        f"{row.trained.ap:.1f} ({row.trained.name})" if row.trained else "-",
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _published_ap(published: Published) -> str:
    values = (published.ap, ""), (published.ap_code, " code"), (published.ap_test_dev, " test-dev")
    return ", ".join(f"{value}{where}" for value, where in values if value is not None) or "-"
