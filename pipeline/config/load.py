"""How a config is loaded, overridden, checked and written; every fault comes in one ConfigError."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.base import Section
from pipeline.config.raw import Argument, parse_yaml, settle
from pipeline.config.root import Config
from pipeline.config.suggest import SPACE, meant
from pipeline.errors import ConfigError
from pipeline.files.credentials import redact, without_login
from pipeline.logs import get_logger

log = get_logger("config")
# Before 0.2 a preset's file held the paper's results in this section. They changed no run, so a copy of such a file or
# the best.yaml of an old sweep still loads, without them.
IGNORED = "published"


def load_config(path: str | Path, overrides: list[str] | dict[str, Any] | None = None) -> Config:
    """Read a YAML file (with at most one `base:` level), apply dotted overrides, validate.

    Args:
        path: YAML 1.2 file, or its URL; `base: other.yaml` in it is resolved against its own folder. A section
            `published` in either is ignored.
        overrides: `["optim.lr=1e-4"]`, where text fields take what was typed and others YAML 1.2's value (`raw`), or
            `{"optim.lr": 1e-4}`.

    Raises:
        ConfigError: one message with every fault found.
    """
    tree = read_yaml(path)
    if SPACE in tree:
        raise ConfigError(f"{path} is the space file of a sweep; start it with `python -m tune.sweep {path}`")
    base = settle(tree.pop("base", None), str, "base", [])
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: must be one file, e.g. base: other.yaml")
        parent = read_yaml(_beside(path, base))
        if "base" in parent:
            raise ConfigError(f"{path}: base {base} has a base of its own; only one level is allowed")
        tree = _merge(parent, tree)
    tree.pop(IGNORED, None)
    faults: list[str] = []
    for key, value in parse_overrides(overrides or {}, faults):
        _assign(tree, key, value, faults)
    return _validate(tree, f"{path} and the key=value settings" if overrides else str(path), faults)


def from_dict(tree: dict[str, Any], source: str = "config") -> Config:
    """Validate a nested dict, as `dump` returns it. Raises ConfigError."""
    return _validate(tree, source, [])


def from_record(tree: dict[str, Any], source: str) -> Config:
    """The config in a file that this product wrote: a run's record, a checkpoint's state, a registered version.

    Earlier versions may have written it. Keys that no section has any more are left out. A value that today's bounds
    refuse takes its default, except in the section `model`, and a warning names it. A login in an address is left out.
    A user's own file is read by `load_config`, which refuses all three.

    Raises:
        ConfigError: a model that today's code cannot build, or sections that do not fit together.
    """
    known = _with_evaluation_groups(_without_logins(_without_unknown(tree, Config)))
    try:
        return Config.model_validate(known)
    except ValidationError as error:
        refused = [fault["loc"] for fault in error.errors() if fault["loc"][:1] != ("model",)]
    for place in refused:
        if key := _remove_value(known, place):
            log.warning("%s: %s has a value that is refused today; its default is used", source, key)
    return from_dict(known, source)


def _with_evaluation_groups(tree: dict[str, Any]) -> dict[str, Any]:
    """Before 0.2 evaluations had the pad groups of the training, of which the recorded AP depends."""
    evaluation, train = tree.get("evaluation", {}), tree.get("train", {})
    if evaluation and "micro_batch" not in evaluation and "micro_batch" in train:
        return tree | {"evaluation": evaluation | {"micro_batch": train["micro_batch"]}}
    return tree


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
    """`["optim.lr=1e-4"]` as `[("optim.lr", Argument("1e-4"))]`; what is not `key=value` is added to `faults`."""
    if isinstance(overrides, dict):
        return list(overrides.items())
    pairs: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            faults.append(f"'{text}': overrides are written key=value, e.g. optim.lr=1e-4")
            continue
        pairs.append((key, Argument(raw)))
    return pairs


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file as `raw.parse_yaml` gives it, `{}` if it is empty. Raises ConfigError."""
    try:
        tree = parse_yaml(_read_text(path))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(redact(f"cannot read config {path}: {reason}")) from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{path} is not YAML: {redact(str(error))}") from None
    except ValueError as error:  # a NUL in its name
        raise ConfigError(f"cannot read config {str(path)!r}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} must hold a mapping of sections, not a {'list' if isinstance(tree, list) else 'value'}"
        )
    return tree


def _read_text(path: str | Path) -> str:
    if "://" not in str(path):
        return Path(path).read_text(encoding="utf-8")
    from pipeline.files.storage import read_bytes  # only now: it brings fsspec along

    return read_bytes(str(path)).decode("utf-8")


def _beside(path: str | Path, other: str) -> str | Path:
    """The file that `other` names in the file at `path`."""
    if "://" in other:
        return other
    if "://" in str(path) and not other.startswith(("/", "~")):
        return f"{str(path).rpartition('/')[0]}/{other}"
    return Path(path).parent / Path(other).expanduser()


def _without_logins(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_logins(value)
        if isinstance(value, dict)
        else without_login(value)
        if isinstance(value, str)
        else value
        for key, value in tree.items()
    }


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _without_unknown(tree: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key in section.model_fields.keys() & tree.keys():
        kind, value = section.model_fields[key].annotation, tree[key]
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Section):
            value = _without_unknown(value, kind)
        known[key] = value
    return known


def _remove_value(tree: dict[str, Any], place: tuple[int | str, ...]) -> str:
    """Remove the setting at a place of pydantic's, an item of a list meaning the list; its key, "" if it is none."""
    *parents, leaf = (str(part) for part in place if isinstance(part, str)) if place else [""]
    for name in parents:
        tree = tree.get(name, {})
        if not isinstance(tree, dict):
            return ""
    if leaf not in tree or isinstance(tree[leaf], dict):
        return ""
    del tree[leaf]
    return ".".join([*parents, leaf])


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
    tree = settle(tree, Config, "", faults)
    try:
        config = Config.model_validate(tree)
        if not faults:
            return config
    except ValidationError as error:
        unread = [fault.partition(":")[0] for fault in faults]  # already explained
        faults = faults + [_explain(fault) for fault in error.errors() if _key(fault) not in unread]
    raise ConfigError(redact("\n  ".join([f"{source}:", *faults])))


def _key(fault: Any) -> str:
    return ".".join(str(part) for part in fault["loc"])


def shorten(text: str) -> str:
    """At most 120 characters of a value in a message."""
    return text if len(text) <= 120 else f"{text[:117]}..."


def _explain(fault: Any) -> str:
    key = _key(fault)
    if fault["type"] == "extra_forbidden":
        known = [*flatten(Config()), *Config.model_fields]
        return f"{key}: unknown key; {meant(key, known)}"
    message = fault["msg"].removeprefix("Value error, ")
    got = "" if isinstance(fault["input"], (dict, Section)) else f" (got {shorten(repr(fault['input']))})"
    return f"{key}: {message}{got}" if key else message
