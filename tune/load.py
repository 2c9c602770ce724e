"""Loading of a space file: YAML that names a config, the settings to search and the search method.

```yaml
config: demo  # a preset by name, or a path relative to this file
overrides: {name: demo-sweep, train.epochs: 3}  # of that config, for every trial
search: {method: asha, samples: 6}
space:
  optim.lr: {loguniform: [1e-4, 1e-3]}
  model.enc_points, model.dec_points: {choice: [2, 4]}  # keys joined by a comma get the same value
```

It needs no Ray. All faults of the file, of its config and of every combination of values are reported in one
ConfigError.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from jobs.presets import find, find_config
from pipeline.config import Config, Section, flatten, load_config, parse_overrides, read_yaml
from pipeline.config.base import Location
from pipeline.config.raw import field_type, plain, settle
from pipeline.config.suggest import nearest
from pipeline.errors import ConfigError
from tune.space import KINDS, Axis, Domain, Search, Space

SPACES = Path(__file__).parent / "spaces"  # those that come with the package
ALL_COMBINATIONS = 10_000  # larger spaces are checked value by value only, to take at most a second
FAULTS_SHOWN = 10
# Settings that all trials must share, with the reason and the place to set them.
SHARED = {
    "name": "the sweep names its trials; set the sweep's own name under overrides",
    "storage": "all trials lie in the sweep's folder; set it under overrides",
    "scaling.": "all trials ask for the same resources; set it under overrides",
    "tracking.": "all trials are logged in one experiment; set it under overrides",
    "train.epochs": "all trials have the same number of epochs to use; set it under overrides",
    "train.eval_epochs": "trials are compared epoch by epoch; set it under overrides",
}


class SpaceFile(Section):
    """The YAML file."""

    config: Location
    overrides: dict[str, Any] = Field(default_factory=dict)  # raw: the config's fields say what they are
    search: Search = Search()
    space: dict[str, Domain] = Field(min_length=1)


def load_space(path: str | Path, overrides: list[str] | None = None) -> Space:
    """Read and check a space file.

    Args:
        path: the YAML file, or the name of one that comes with the package.
        overrides: `key=value` of the config for all trials, or `search.samples=4` of the search.

    Raises:
        ConfigError: one message with every fault found.
    """
    faults: list[str] = []
    path = find(str(path), SPACES)
    tree = read_yaml(path)
    given = dict(parse_overrides(overrides or [], faults))
    steering = {key.removeprefix("search."): value for key, value in given.items() if key.startswith("search.")}
    if steering and isinstance(tree.setdefault("search", {}), dict):
        tree["search"] |= steering
    settings = {key: value for key, value in given.items() if not key.startswith("search.")}
    tree = settle(tree, SpaceFile, "", faults)
    try:
        file = SpaceFile.model_validate(tree)
    except ValidationError as error:
        raise _refuse(path, faults + [_explain(fault) for fault in error.errors()]) from None

    settings = file.overrides | settings
    axes = tuple(_axis(keys, domain) for keys, domain in file.space.items())
    faults += _key_faults(axes, settings)
    try:
        base = load_config(find_config(file.config, path.parent), settings)
    except ConfigError as error:
        raise _refuse(path, [*faults, str(error)]) from None
    space = Space(base, file.search, axes)
    faults += _search_faults(space)
    if not faults:  # only now does every combination make sense as a config
        faults += _combination_faults(space)
    if faults:
        raise _refuse(path, faults)
    return space


def _axis(keys: str, domain: Domain) -> Axis:
    """The axis of a line of the file; listed values are read as the config reads those of the (first) key."""
    names = tuple(key.strip() for key in keys.split(","))
    kind = field_type(Config, names[0])
    listed = {name: getattr(domain, name) for name in ("choice", "grid") if getattr(domain, name) is not None}
    settled = {name: tuple(plain(settle(value, kind, "", [])) for value in values) for name, values in listed.items()}
    return Axis(names, domain.model_copy(update=settled))


def _key_faults(axes: tuple[Axis, ...], settings: Mapping[str, Any]) -> list[str]:
    faults: list[str] = []
    known = list(flatten(Config()))
    seen: set[str] = set()
    for key in itertools.chain.from_iterable(axis.keys for axis in axes):
        shared = next(
            (why for name, why in SHARED.items() if key == name or key.startswith(name.rstrip(".") + ".")), None
        )
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside:
            faults.append(f"space: '{key}' is a section; search one of its keys, e.g. '{inside[0]}'")
        elif key not in known:
            faults.append(f"space: {key}: unknown key; did you mean '{nearest(key, known)}'?")
        elif shared:
            faults.append(f"space: {key} cannot be searched: {shared}")
        elif key in seen:
            faults.append(f"space: {key} is searched twice")
        elif key in settings:
            faults.append(f"{key} is both searched and fixed; remove it from the space or from the overrides")
        seen.add(key)
    return faults


def _search_faults(space: Space) -> list[str]:
    from pipeline.evaluation.coco import METRICS  # only here: it brings torch along

    faults: list[str] = []
    search, train = space.search, space.base.train
    known = [f"val/{name}" for name in METRICS]
    if search.metric not in known:
        faults.append(f"search.metric: there is no '{search.metric}'; did you mean '{nearest(search.metric, known)}'?")
    if search.method == "grid":
        faults += [
            f"space: {axis.label}: search.method grid crosses listed values; write {{grid: [...]}} or use random"
            for axis in space.axes
            if axis.domain.grid is None
        ]
    if search.method == "asha" and not space.rungs:
        faults.append(
            f"search.grace {search.grace} is not below train.epochs {train.epochs}: no trial would be stopped"
        )
    if search.method == "asha" and train.eval_epochs != 1:
        faults.append("search.method asha compares every epoch; set train.eval_epochs=1 under overrides")
    return faults


def _combination_faults(space: Space) -> list[str]:
    faults: dict[str, None] = {}
    for values in _combinations(space.axes):
        try:
            space.config(values, "trial")
        except ConfigError as error:
            faults |= dict.fromkeys(str(error).split("\n  ")[1:])  # the first line only repeats the values
    return [f"space: {fault}" for fault in itertools.islice(faults, FAULTS_SHOWN)]


def _combinations(axes: tuple[Axis, ...]) -> Iterator[dict[str, Any]]:
    labels = [axis.label for axis in axes]
    probes = [axis.domain.probes for axis in axes]
    if math.prod(map(len, probes)) <= ALL_COMBINATIONS:
        yield from (dict(zip(labels, row, strict=True)) for row in itertools.product(*probes))
        return
    first = {label: values[0] for label, values in zip(labels, probes, strict=True)}
    for label, values in zip(labels, probes, strict=True):
        yield from (first | {label: value} for value in values)


def _refuse(path: str | Path, faults: list[str]) -> ConfigError:
    return ConfigError("\n  ".join([f"{path}:", *faults]))


def _explain(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = [*SpaceFile.model_fields, *(f"search.{name}" for name in Search.model_fields)]
        if fault["loc"][0] == "space":
            parent = ".".join(str(part) for part in fault["loc"][:-1])
            known = [f"{parent}.{kind}" for kind in KINDS]
        return f"{where}: unknown key; did you mean '{nearest(where, known)}'?"
    if fault["type"] == "model_type" and fault["loc"][0] == "space":
        return f"{where}: write what to search as {{choice: [...]}} or another of {', '.join(KINDS)}"
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}"
