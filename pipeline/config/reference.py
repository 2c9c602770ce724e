"""Every setting with type, default, bounds and meaning, as text for `jobs.settings` and as the page docs/settings.md.

Read from pydantic's JSON schema of the config, so that nothing is written twice. A key that does not exist is a
ConfigError with the nearest one.
"""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config.root import Config
from pipeline.config.suggest import meant
from pipeline.errors import ConfigError

WIDTH = 110
PAGE_WIDTH = 120
TYPES = {"number": "number", "integer": "integer", "boolean": "true or false", "string": "text", "null": "null"}
PAGE = """# Settings

This page is made from the docstrings in `pipeline/config/` by `python -m jobs.settings --markdown`; change it there.
`python -m jobs.settings optim.lr` prints one entry in the terminal.

A key is the path in a YAML file, the override on the command line (`optim.lr=1e-4`), the key in a search space and the
parameter in MLflow. Later wins: defaults, `base:` file, YAML file, `key=value`, trial.
"""


@dataclass(frozen=True)
class Setting:
    """One line of the reference."""

    key: str
    kind: str
    bounds: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """A section without the sections in it; the key of the config's own settings is empty."""

    key: str
    meaning: str
    settings: tuple[Setting, ...]


def groups() -> list[Group]:
    """All sections, each before the sections in it."""
    schema = Config.model_json_schema()
    return list(_groups("", schema, schema["$defs"]))


def find(key: str) -> list[Group]:
    """The sections that a key means, or one section with one setting; everything for an empty key.

    Raises:
        ConfigError: neither a section nor a setting has this name.
    """
    every = groups()
    if not key:
        return every
    found = [group for group in every if group.key == key or group.key.startswith(f"{key}.")]
    if not found:
        found = [
            Group(group.key, group.meaning, (setting,))
            for group in every
            for setting in group.settings
            if setting.key == key
        ]
    if not found:
        known = [name for group in every for name in (group.key, *(setting.key for setting in group.settings)) if name]
        raise ConfigError(f"{key}: no such setting or section; {meant(key, known)}")
    return found


def as_text(chosen: list[Group]) -> str:
    """For a terminal."""
    lines: list[str] = []
    for group in chosen:
        lines += [f"{group.key or 'the run'}: {group.meaning}", ""]
        for setting in group.settings:
            limits = f" ({setting.bounds})" if setting.bounds else ""
            lines += [f"  {setting.key}: {setting.kind}{limits}, default {setting.default}"]
            lines += [*textwrap.wrap(setting.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6), ""]
    return "\n".join(lines).rstrip()


def as_markdown(chosen: list[Group]) -> str:
    """The page docs/settings.md."""
    lines = [PAGE]
    for group in chosen:
        meaning = textwrap.fill(group.meaning, PAGE_WIDTH, break_on_hyphens=False)
        lines += [f"## {f'`{group.key}`' if group.key else 'The run'}", "", meaning, ""]
        lines += ["| setting | type | bounds | default | meaning |", "|---|---|---|---|---|"]
        for setting in group.settings:
            cells = (f"`{setting.key}`", setting.kind, setting.bounds, f"`{setting.default}`", setting.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _groups(key: str, schema: dict[str, Any], sections: dict[str, Any]) -> Iterator[Group]:
    prefix = f"{key}." if key else ""
    inner = {name: field["$ref"].rpartition("/")[2] for name, field in schema["properties"].items() if "$ref" in field}
    own = {name: field for name, field in schema["properties"].items() if name not in inner}
    settings = (_setting(prefix + name, field) for name, field in own.items())
    yield Group(key, _one_line(schema["description"]), tuple(settings))
    for name, section in inner.items():
        yield from _groups(prefix + name, sections[section], sections)


def _setting(key: str, field: dict[str, Any]) -> Setting:
    default = field["default"]
    text = default if isinstance(default, str) and default else json.dumps(default)
    return Setting(key, _kind(field), _bounds(field), text, _one_line(field.get("description", "")))


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(member) for member in field["anyOf"])
    if "enum" in field or "const" in field:
        *first, last = (f"`{choice}`" for choice in field.get("enum", [field.get("const")]))
        return f"{', '.join(first)} or {last}" if first else last
    if field["type"] == "array" and "prefixItems" in field:
        return f"[{', '.join(_kind(item) for item in field['prefixItems'])}]"
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}s"
    return str(field.get("format", TYPES[field["type"]]))


def _bounds(field: dict[str, Any]) -> str:
    """Of the value, or of each value in a list."""
    members = [*field.get("anyOf", ()), *field.get("prefixItems", ())[:1], *filter(None, [field.get("items")])]
    if "minimum" in field and "maximum" in field:
        parts = [f"{_number(field['minimum'])} to {_number(field['maximum'])}"]
    else:
        words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
        parts = [f"{word} {_number(field[name])}" for name, word in words.items() if name in field]
    if field.get("minLength"):
        parts.append("not empty")
    if "maxLength" in field:
        parts.append(f"at most {field['maxLength']} characters")
    return ", ".join(parts) or next(filter(None, map(_bounds, members)), "")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())
