"""Hypothesis strategies for settings, read from the config's own schema, so that a new setting joins by itself."""

from typing import Any

from hypothesis import strategies as st

from pipeline.config import Config, from_dict
from pipeline.errors import ConfigError

WORDS = ("", "a", "x1", "runs", "two words", "007", "on", "null", "1e-4", "[1]", "s3://bucket/a=b", "#", "ä: b")


def fields(schema: dict[str, Any] | None = None, key: str = "") -> dict[str, dict[str, Any]]:
    """The JSON schema of each setting by its key."""
    whole = Config.model_json_schema()
    found = {}
    for name, field in (schema or whole)["properties"].items():
        place = f"{key}.{name}".lstrip(".")
        inner = field.get("$ref", "").rpartition("/")[2]
        found |= fields(whole["$defs"][inner], place) if inner else {place: field}
    return found


def values(field: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the field's schema allows; its validators may refuse some."""
    if "anyOf" in field:
        return st.one_of([values(member) for member in field["anyOf"]])
    if "enum" in field or "const" in field:
        return st.sampled_from(field.get("enum") or [field["const"]])
    match field["type"]:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            highest = field.get("maximum", field.get("exclusiveMaximum", 1) - 1)
            return st.integers(field["minimum"], highest) | st.integers(field["minimum"], min(highest, 40))
        case "number":
            lowest, highest = field.get("minimum"), field.get("maximum")
            return st.floats(
                field["exclusiveMinimum"] if lowest is None else lowest,
                field["exclusiveMaximum"] if highest is None else highest,
                exclude_min=lowest is None,
                exclude_max=highest is None,
            )
        case "array" if "prefixItems" in field:
            return st.tuples(*map(values, field["prefixItems"])).map(sorted)
        case "array":
            return st.lists(values(field["items"]), min_size=field.get("minItems", 0), max_size=3)
    return st.sampled_from(WORDS)


FIELDS = fields()
SETTINGS = st.sampled_from(sorted(FIELDS)).flatmap(lambda key: st.tuples(st.just(key), values(FIELDS[key])))


def put(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The nested dict with one more setting in it."""
    first, _, rest = key.partition(".")
    return {**tree, first: put(tree.get(first, {}), rest, value) if rest else value}


def accepted(tree: dict[str, Any]) -> Config | None:
    """The config of a nested dict, None where it is refused."""
    try:
        return from_dict(tree)
    except ConfigError:
        return None


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Configs with up to twenty drawn settings; one that the others refuse is left out."""
    tree: dict[str, Any] = {}
    for key, value in draw(st.lists(SETTINGS, max_size=20)):
        if accepted(put(tree, key, value)):
            tree = put(tree, key, value)
    return from_dict(tree)
