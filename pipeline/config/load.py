"""How a config is loaded, overridden, checked and written; every fault comes in one ConfigError."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.base import Section
from pipeline.config.root import Config
from pipeline.errors import ConfigError
from pipeline.suggest import nearest


def load_config(path: str | Path, overrides: list[str] | dict[str, Any] | None = None) -> Config:
    """Read a YAML file (with at most one `base:` level), apply dotted overrides, validate.

    Args:
        path: YAML file; `base: other.yaml` in it is resolved against its own folder.
        overrides: `["optim.lr=1e-4"]`, values parsed as YAML, or `{"optim.lr": 1e-4}`.

    Raises:
        ConfigError: one message with every fault found.
    """
    tree = read_yaml(Path(path))
    base = tree.pop("base", None)
    if base is not None:
        parent = read_yaml(Path(path).parent / str(base))
        if "base" in parent:
            raise ConfigError(f"{path}: base {base} has a base of its own; only one level is allowed")
        tree = _merge(parent, tree)
    faults: list[str] = []
    for key, value in parse_overrides(overrides or {}, faults):
        _assign(tree, key, value, faults)
    return _validate(tree, str(path), faults)


def from_dict(tree: dict[str, Any], source: str = "config") -> Config:
    """Validate a nested dict, as `dump` returns it. Raises ConfigError."""
    return _validate(tree, source, [])


def override(config: Config, overrides: list[str]) -> Config:
    """The config with `key=value` settings on top, as `load_config` would apply them. Raises ConfigError."""
    tree, faults = dump(config), list[str]()
    for key, value in parse_overrides(overrides, faults):
        _assign(tree, key, value, faults)
    return _validate(tree, "overrides", faults)


def dump(config: Config) -> dict[str, Any]:
    """The config as a nested dict of JSON types; `from_dict(dump(c)) == c`."""
    return config.model_dump(mode="json")


def dump_yaml(config: Config) -> str:
    """The config as YAML that `load_config` reads back."""
    return yaml.safe_dump(dump(config), sort_keys=False)


def flatten(config: Section) -> dict[str, Any]:
    """`{"optim.lr": 0.0002, ...}`: MLflow's parameters and the space of legal keys."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            flat |= {f"{name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def parse_overrides(overrides: list[str] | dict[str, Any], faults: list[str]) -> list[tuple[str, Any]]:
    """`["optim.lr=1e-4"]` as `[("optim.lr", ...)]`, values read as YAML; what cannot be read is added to `faults`."""
    if isinstance(overrides, dict):
        return list(overrides.items())
    pairs: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            faults.append(f"'{text}': overrides are written key=value, e.g. optim.lr=1e-4")
            continue
        try:
            pairs.append((key, yaml.safe_load(raw) if raw else ""))
        except yaml.YAMLError:
            faults.append(f"{key}: '{raw}' is not a YAML value")
    return pairs


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, `{}` if it is empty. Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
    return tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _assign(tree: dict[str, Any], key: str, value: Any, faults: list[str]) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            faults.append(f"{key}: '{name}' is a value, not a section")
            return
        tree = child
    tree[leaf] = value


def _validate(tree: dict[str, Any], source: str, faults: list[str]) -> Config:
    try:
        config = Config.model_validate(tree)
        if not faults:
            return config
    except ValidationError as error:
        faults = faults + [_explain(fault) for fault in error.errors()]
    raise ConfigError("\n  ".join([f"{source}:", *faults]))


def _explain(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = [*flatten(Config()), *Config.model_fields]
        return f"{key}: unknown key; did you mean '{nearest(key, known)}'?"
    message = fault["msg"].removeprefix("Value error, ")
    got = "" if isinstance(fault["input"], (dict, Section)) else f" (got {fault['input']!r})"
    return f"{key}: {message}{got}" if key else message
