"""Registered models, versions and the origin of a version as text for a terminal. Never fails."""

from collections.abc import Mapping, Sequence

from pipeline.pages.render import clean
from pipeline.registry.listing import SHOWN_METRICS, ModelRow, Tree

SHOWN_SETTINGS = 3  # that differ, in the table


def models_text(rows: Sequence[ModelRow]) -> str:
    """A line for each model."""
    if not rows:
        return "no registered models; `python -m jobs.register RUN` makes one"
    names = [_cell(row.name) for row in rows]
    width = max(map(len, names))
    return "\n".join(
        f"{name:<{width}}  {row.versions:>3} versions  "
        + ", ".join(f"@{alias} = {version}" for alias, version in row.aliases.items())
        for name, row in zip(names, rows, strict=True)
    )


def rows_text(rows: Sequence[Tree]) -> str:
    """The table of versions."""
    head = ["version", "aliases", *SHOWN_METRICS, "data", "size", "date", "run", "differs from @champion"]
    table = [head]
    for row in rows:
        differs = [f"{key}={pair[1]}" for key, pair in row["differs_from_champion"].items()]
        more = len(differs) - SHOWN_SETTINGS
        table.append(
            [
                row["version"],
                " ".join(f"@{alias}" for alias in row["aliases"]),
                *(_number(row[name]) for name in SHOWN_METRICS),
                (row["data_digest"] or "-")[:8],
                _size(row["bytes"]),
                row["created"][:10],
                row["run"] or "-",
                " ".join(differs[:SHOWN_SETTINGS]) + (f" and {more} more" if more > 0 else ""),
            ]
        )
    table = [[_cell(cell) for cell in line] for line in table]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(line.rstrip() for line in lines)


def lineage_text(tree: Tree) -> str:
    """A version's origin, one fact a line."""
    aliases = f" (@{', @'.join(tree['aliases'])})" if tree["aliases"] else ""
    run = tree["run"]
    facts = [
        ("registered", tree["created"]),
        ("run", f"{run['name']}, {run['status'] or 'status not known'}, by {run['user'] or '-'}"),
        ("folder", run["folder"]),
        ("MLflow run", f"{run['id'] or ''} (deleted)".strip() if run["deleted"] else run["id"]),
        ("git commit", tree["git_commit"]),
        ("checkpoint", f"step {tree['step']}, {_size(tree['bytes'])}, sha256 {tree['checkpoint_sha256']}"),
        ("train digest", tree["data_digest"]),
        ("val digest", tree["val_digest"]),
        *((f"{split} data", f"{each['folder']} {each['digest'][:12]}") for split, each in tree["data"].items()),
        *((f"{split} numbers", _numbers(numbers)) for split, numbers in tree["evaluations"].items()),
        *(
            ("evaluated", f"{_numbers(each['metrics'])} on data {str(each['key'].get('data'))[:12]}")
            for each in tree["promotion_results"]
        ),
        *((f"promotion {key}", value) for key, value in tree["promotion"].items()),
    ]
    lines = [f"models:/{tree['model']}/{tree['version']}{aliases}"]
    lines += [f"  {name:<20} {_cell(value or '-')}" for name, value in facts]
    if against := tree.get("against"):
        lines.append(f"differs from version {against['version']} in {len(against['settings'])} settings")
        lines += [f"  {key:<32} {_cell(pair[0])} -> {_cell(pair[1])}" for key, pair in against["settings"].items()]
        for split, found in against.get("data", {}).items():
            lines.append(f"{split} data: {'the same' if not found else 'different'}")
            lines += [f"  {line}" for line in found]
    lines.append("settings" if tree["settings"] else "settings: MLflow has none of its run")
    lines += [f"  {_cell(key):<32} {_cell(value)}" for key, value in tree["settings"].items()]
    return "\n".join(lines)


def _cell(text: str | None) -> str:
    """In one line and without control characters, which models of other tools may have."""
    return str(clean(" ".join(str(text).split())))


def _numbers(numbers: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_number(numbers[name])}" for name in SHOWN_METRICS if name in numbers)


def _number(value: float | None) -> str:
    return "-" if value is None or value < 0 else f"{value:.4f}"


def _size(size: int | None) -> str:
    return "gone" if size is None else f"{size / 2**20:.1f} MiB"
