"""YAML values that wait for the type of their field: text fields keep what was written, others get YAML 1.2's value.

PyYAML reads YAML 1.1, where `on` is true, `007` is 7, `2024-05-01` is a date and `1e-4` is text. Here a scalar stays
raw until `settle` knows its field. The rule, by the field's type:

- text, and a choice among texts: what was written. On the command line that is everything after the `=`.
- a union with text in it (`int | str`, `str | None`): the value if another member accepts it as it is (numbers, `true`,
  `null`), else what was written.
- a list, tuple, mapping or section: the same rule for each of its members.
- every other type: the value by YAML 1.2's core schema.
- `Any`: stays raw, for the caller who knows the type.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

NULL, BOOL, INT, FLOAT, STR = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
MERGE = "tag:yaml.org,2002:merge"  # `<<`, which YAML 1.2 lacks and many files have
MAX_VALUES = 100_000  # nine aliases in each of nine lists are 400 million


@dataclass(frozen=True)
class Scalar:
    """A scalar of a YAML file: its text, without quotes, and its value by YAML 1.2."""

    text: str
    value: Any


@dataclass(frozen=True)
class Argument:
    """What stands after the `=` of a `key=value` override."""

    text: str


class _Loader(yaml.SafeLoader):
    """PyYAML with the scalars of YAML 1.2's core schema (https://yaml.org/spec/1.2.2, chapter 10.3)."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # add_implicit_resolver fills it, as in its base


for _tag, _pattern, _first in (
    (NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    (MERGE, "<<", ["<"]),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def parse_yaml(text: str) -> Any:
    """The one document of a text: dicts with text keys, lists, `Scalar`s, and None where the file says null.

    Raises:
        yaml.YAMLError: not YAML, a key given twice, a tag of its own, an alias inside its own anchor, too deep, or of
            more than MAX_VALUES values.
    """
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _tree(node, (), iter(range(MAX_VALUES)))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _tree(node: yaml.Node, above: tuple[int, ...], allowed: Iterator[int]) -> Any:
    """The value of a node; each value takes one number from `allowed`."""
    if id(node) in above:
        raise yaml.YAMLError(f"an alias stands inside its own anchor{node.start_mark}")
    if next(allowed, None) is None:
        raise yaml.YAMLError(f"it has more than {MAX_VALUES:,} values, those of aliases counted at each use")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_tree(item, above, allowed) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        counts = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
        if counts.total() < len(node.value):
            raise yaml.YAMLError(f"a key is no text{node.start_mark}")
        if twice := next((name for name, count in counts.items() if count > 1), None):
            raise yaml.YAMLError(f"the key '{twice}' is given twice{node.start_mark}")
        merged: dict[str, Any] = {}
        for key, item in node.value:
            if key.tag == MERGE:
                merged = _merged(item, above, allowed)
        return merged | {key.value: _tree(item, above, allowed) for key, item in node.value if key.tag != MERGE}
    return _scalar(node)


def _merged(node: yaml.Node, above: tuple[int, ...], allowed: Iterator[int]) -> dict[str, Any]:
    """What `<<` stands for: a mapping, or a list of mappings of which the first with a key counts."""
    merged: dict[str, Any] = {}
    for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if not isinstance(part, yaml.MappingNode):
            raise yaml.YAMLError(f"<< takes a mapping or a list of mappings{node.start_mark}")
        merged = _tree(part, above, allowed) | merged
    return merged


def _scalar(node: yaml.Node) -> Scalar | None:
    text, tag = node.value, node.tag
    if tag == NULL:
        return None
    if tag not in (BOOL, INT, FLOAT, STR):
        raise yaml.YAMLError(f"the tag {tag} is not known here{node.start_mark}")
    try:
        return Scalar(text, _READ[tag](text))
    except ValueError:  # `!!int x`, or more digits than Python reads: the field's type says what is wrong
        return Scalar(text, text)


def _int(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower()))


_READ: dict[str, Any] = {BOOL: lambda text: text.lower() == "true", INT: _int, FLOAT: _float, STR: str}


def settle(value: Any, kind: Any, key: str, faults: list[str]) -> Any:
    """A value of plain Python types from a raw one.

    Args:
        value: what `parse_yaml` returned, `Argument`s in it or not; plain values stay as they are.
        kind: the type of the field, or a section.
        key: its name in messages.
        faults: gets a line for each `Argument` that is not YAML where its field needs YAML.
    """
    if get_origin(kind) is Annotated:
        return settle(value, get_args(kind)[0], key, faults)
    if kind is Any:
        return value
    if isinstance(value, (Scalar, Argument)) and _is_text(kind):
        return value.text
    if get_origin(kind) in (Union, UnionType):
        return _settle_union(value, get_args(kind), key, faults)
    if isinstance(value, Argument):
        return settle(_parse_argument(value, key, faults), kind, key, faults)
    if isinstance(value, Scalar):  # pydantic would make 1 of true
        return value.text if isinstance(value.value, bool) and kind in (int, float) else value.value
    if isinstance(value, list):
        kinds = _kinds_of_items(kind, len(value))
        return [
            settle(item, own, f"{key}.{place}", faults)
            for place, (item, own) in enumerate(zip(value, kinds, strict=True))
        ]
    if isinstance(value, dict):
        return {name: settle(item, _kind_of_key(kind, name), _join(key, name), faults) for name, item in value.items()}
    return value


def plain(value: Any) -> Any:
    """A raw value as YAML 1.2 reads it, for a field that nobody knows."""
    return settle(value, object, "", [])


def field_type(section: type[BaseModel], key: str) -> Any:
    """The type of a dotted key such as `optim.lr`, with the section's types for sections; `object` if there is none."""
    kind: Any = section
    for name in key.split("."):
        kind = _kind_of_key(kind, name)
    return kind


def _settle_union(value: Any, members: tuple[Any, ...], key: str, faults: list[str]) -> Any:
    others = [member for member in members if not _is_text(member)]
    text = value.text if len(others) < len(members) and isinstance(value, (Scalar, Argument)) else None
    if text is None and isinstance(value, Argument):
        value = _parse_argument(value, key, faults)
    for member in others:
        found = settle(value, member, key, [])
        try:
            TypeAdapter(member).validate_python(found, strict=not isinstance(found, (list, dict)))
            return found
        except ValidationError:
            continue
    return settle(value, others[0] if others else object, key, []) if text is None else text


def _parse_argument(value: Argument, key: str, faults: list[str]) -> Any:
    if not value.text:
        return ""  # null is written null
    try:
        return parse_yaml(value.text)
    except yaml.YAMLError:
        faults.append(f"{key}: '{value.text}' is not a YAML value")
        return value.text


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Annotated:
        return _is_text(get_args(kind)[0])
    return kind is str or (get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind)))


def _kinds_of_items(kind: Any, length: int) -> list[Any]:
    given = get_args(kind) if get_origin(kind) in (tuple, list) else ()
    if get_origin(kind) is tuple and given[-1:] != (...,):
        return [*given, *[object] * length][:length]
    return [given[0] if given else object] * length


def _kind_of_key(kind: Any, name: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_fields[name].annotation if name in kind.model_fields else object
    return get_args(kind)[1] if get_origin(kind) is dict else object


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
