"""Loading of a space file: YAML that names a config, the settings to search and how to search them.

```yaml
config: demo  # a preset by name, or a path relative to this file
overrides: {name: demo-sweep, train.epochs: 3}  # of that config, for every trial
search: {sampler: random, scheduler: asha, samples: 6}
space:
  optim.lr: {loguniform: [1e-4, 1e-3]}
  model.enc_points, model.dec_points: {choice: [2, 4]}  # keys joined by a comma get the same value
  variant: {plain: {}, refine: {model.refine: true}}  # named bundles of settings
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
from tune.search.ledger import best_name, trial_names
from tune.search.pbt import MUTABLE, boundaries
from tune.settings import KINDS, Domain, Search, split_method
from tune.space import VARIANT, Axis, Space

SPACES = Path(__file__).parent / "spaces"  # those that come with the package
ALL_COMBINATIONS = 1_000  # larger spaces are checked value by value only, to take at most a second
FAULTS_SHOWN = 10
LAST_POINT = 999  # whose name is as long as that of any trial of a sweep of usual size
# Settings that all trials must share, with the reason and the place to set them.
SHARED = {
    "name": "the sweep names its trials; set the sweep's own name under overrides",
    "storage": "all trials lie in the sweep's folder; set it under overrides",
    "scaling.": "all trials ask for the same resources; set it under overrides",
    "tracking.": "all trials are logged in one experiment; set it under overrides",
}
# The same, if a scheduler compares trials epoch by epoch.
COMPARED = {
    "train.epochs": "search.scheduler {} compares trials of equal length; set it under overrides, or scheduler: none",
    "train.eval_epochs": "search.scheduler {} compares every epoch; set it under overrides, or scheduler: none",
}


class SpaceFile(Section):
    """The YAML file."""

    config: Location
    overrides: dict[str, Any] = Field(default_factory=dict)  # raw: the config's fields say what they are
    search: Search = Search()
    space: dict[str, Domain]


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
    if tree and not tree.keys() & SpaceFile.model_fields.keys():
        raise ConfigError(
            f"{path} is no space file: it has neither `config:` nor `space:`. If it is a config, write a space file "
            "that names it, see docs/sweeps.md"
        )
    given = dict(parse_overrides(overrides or [], faults))
    steering = {key.removeprefix("search."): value for key, value in given.items() if key.startswith("search.")}
    _merge_search(tree, steering, faults)
    short = given.keys() & Search.model_fields.keys() - Config.model_fields.keys()
    faults += [f"{key}: unknown key; did you mean 'search.{key}'?" for key in sorted(short)]
    settings = {key: value for key, value in given.items() if not key.startswith("search.") and key not in short}
    bundles = _take_variants(tree, faults)
    tree = settle(tree, SpaceFile, "", faults)
    try:
        file = SpaceFile.model_validate(tree)
    except ValidationError as error:
        raise _refuse(path, faults + [_explain(fault) for fault in error.errors()]) from None

    settings = file.overrides | settings
    axes = tuple(_axis(keys, domain) for keys, domain in file.space.items())
    if bundles:
        axes = (Axis((VARIANT,), Domain(choice=tuple(bundles)), bundles), *axes)
    faults += _key_faults(axes, settings, file.search)
    search = file.search.model_copy(update={"points": _read_points(file.search.points, axes, faults)})
    try:
        base = load_config(find_config(file.config, path.parent), settings)
    except ConfigError as error:
        raise _refuse(path, [*faults, str(error)]) from None
    space = Space(base, search, axes)
    faults += _search_faults(space)
    if not faults:  # only now does every combination make sense as a config
        faults += _combination_faults(space) or _budget_faults(space)
    if faults:
        raise _refuse(path, faults)
    return space


def _merge_search(tree: dict[str, Any], steering: Mapping[str, Any], faults: list[str]) -> None:
    """Put the overrides of the search over the file's; each may have the old key `method`."""
    if not isinstance(tree.get("search", {}), dict):
        return  # the section's type says so
    merged: dict[str, Any] = {}
    for given in (tree.get("search", {}), steering):
        try:
            merged |= split_method(given)
        except ValueError as error:
            faults.append(f"search.method: {error}")
    tree["search"] = merged


def _take_variants(tree: dict[str, Any], faults: list[str]) -> dict[str, dict[str, Any]]:
    """Remove `space.variant` from the file's tree; its values are read as the config reads those of the keys."""
    space = tree.get("space")
    if not isinstance(space, dict) or VARIANT not in space:
        return {}
    raw = space.pop(VARIANT)
    if not isinstance(raw, dict) or not raw or not all(isinstance(bundle, dict) for bundle in raw.values()):
        faults.append(f"space.{VARIANT}: write {VARIANT}: {{NAME: {{model.name: detr}}, OTHER: {{}}}}")
        return {}
    return {name: {key: _read(key, value) for key, value in bundle.items()} for name, bundle in raw.items()}


def _read(key: str, value: Any) -> Any:
    """A raw value as the config reads that of `key`."""
    return plain(settle(value, field_type(Config, key), "", []))


def _read_points(points: tuple[dict[str, Any], ...], axes: tuple[Axis, ...], faults: list[str]) -> tuple[Any, ...]:
    """The points with the axes' labels as keys; a key is any of those that an axis sets."""
    by_key = {key: axis for axis in axes for key in (*axis.keys, axis.label)}
    found = []
    for number, point in enumerate(points):
        values: dict[str, Any] = {}
        for key, raw in point.items():
            axis, where = by_key.get(key), f"search.points.{number}.{key}"
            if axis is None:
                faults.append(f"{where}: is not searched; did you mean '{nearest(key, by_key)}'?")
                continue
            value = settle(raw, str, where, faults) if axis.bundles else _read(axis.keys[0], raw)
            if not axis.domain.holds(value):
                faults.append(f"{where}: {value!r} is not one of the space's values")
            if values.setdefault(axis.label, value) != value:
                faults.append(f"{where}: {axis.label} has one value, and {values[axis.label]!r} was given before")
        found.append(values)
    return tuple(found)


def _axis(keys: str, domain: Domain) -> Axis:
    """The axis of a line of the file; listed values are read as the config reads those of the (first) key."""
    names = tuple(key.strip() for key in keys.split(","))
    listed = {name: getattr(domain, name) for name in ("choice", "grid") if getattr(domain, name) is not None}
    read = {name: tuple(_read(names[0], value) for value in values) for name, values in listed.items()}
    return Axis(names, domain.model_copy(update=read))


def _key_faults(axes: tuple[Axis, ...], settings: Mapping[str, Any], search: Search) -> list[str]:
    faults: list[str] = []
    if not axes:
        faults.append("space: give at least one setting to search")
    seen: set[str] = set()
    for axis in axes:
        keys = {key for bundle in axis.bundles.values() for key in bundle} if axis.bundles else axis.keys
        for key in sorted(keys) if axis.bundles else keys:
            if fault := _key_fault(key, search):
                faults.append(f"space.{VARIANT}: {fault}" if axis.bundles else f"space: {fault}")
            elif key in seen:
                faults.append(f"space: {key} is searched twice")
            elif key in settings and all(key in bundle for bundle in axis.bundles.values()):  # else some keep it
                faults.append(f"{key} is both searched and fixed; remove it from the space or from the overrides")
            seen.add(key)
    return faults


def _key_fault(key: str, search: Search) -> str:
    """Why a setting cannot be searched; empty if it can."""
    known = list(flatten(Config()))
    shared = SHARED | ({} if search.early_stop == "none" else COMPARED)
    if search.repeats > 1:
        shared = shared | {"seed": "search.repeats gives each repeat its own seed"}
    why = next((why for name, why in shared.items() if key == name or key.startswith(name.rstrip(".") + ".")), None)
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"'{key}' is a section; search one of its keys, e.g. '{inside[0]}'"
    if key not in known:
        return f"{key}: unknown key; did you mean '{nearest(key, known)}'?"
    return f"{key} cannot be searched: {why.format(search.early_stop)}" if why else ""


def _search_faults(space: Space) -> list[str]:
    from pipeline.evaluation.coco import METRICS  # only here: it brings torch along

    faults: list[str] = []
    search, train = space.search, space.base.train
    known = [f"val/{name}" for name in METRICS]
    if search.metric not in known:
        faults.append(f"search.metric: there is no '{search.metric}'; did you mean '{nearest(search.metric, known)}'?")
    if search.sampler == "grid":
        faults += [
            f"space: {axis.label}: search.sampler grid crosses listed values; write {{grid: [...]}} or use random"
            for axis in space.axes
            if axis.domain.values is None or (axis.domain.choice and not axis.bundles)
        ]
        faults += [
            f"search.points.{number}: search.sampler grid needs a value for {axis.label}"
            for number, point in enumerate(search.points)
            for axis in space.axes
            if axis.label not in point
        ]
    faults += [
        f"space: {axis.label}: grid runs each value once, and {value!r} is listed twice"
        for axis in space.axes
        for place, value in enumerate(axis.domain.grid or ())
        if value in (axis.domain.grid or ())[:place]
    ]
    if search.sampler == "tpe":
        faults += [
            f"space: {axis.label}: search.sampler tpe chooses values; write {{choice: [...]}}"
            for axis in space.axes
            if axis.domain.grid is not None
        ]
    searched = [pair for axis in space.axes for value in axis.domain.probes for pair in axis.settings(value).items()]
    given = [("model.num_classes", space.base.model.num_classes), ("train.micro_batch", train.micro_batch), *searched]
    faults += [
        f"{key}: auto is chosen by the first start of a single run; give a number, the same for all trials"
        for key, value in given
        if key in ("model.num_classes", "train.micro_batch") and value == "auto"
    ]
    if search.early_stop == "asha" and not space.rungs:
        faults.append(
            f"search.grace {search.grace} is not below train.epochs {train.epochs}: no trial would be stopped"
        )
    if search.early_stop != "none" and train.eval_epochs != 1:
        faults.append(
            f"search.scheduler {search.early_stop} compares every epoch; set train.eval_epochs=1 under overrides"
        )
    return faults + _pbt_faults(space)


def _pbt_faults(space: Space) -> list[str]:
    """What keeps pbt from handing over checkpoints, or from training in parts."""
    if space.search.early_stop != "pbt":
        return []
    keys = [key for axis in space.axes for value in axis.domain.probes for key in axis.settings(value)]
    faults = [
        f"space: {key} cannot be searched by pbt, which keeps the weights; search optim.*, loss.*, train.ema_decay"
        for key in dict.fromkeys(keys)
        if not key.startswith(MUTABLE)
    ]
    pairs = [pair for axis in space.axes for value in axis.domain.probes for pair in axis.settings(value).items()]
    if space.base.optim.schedule == "cosine" or ("optim.schedule", "cosine") in pairs:
        faults.append("optim.schedule=cosine depends on the length of a run, and pbt trains in parts; use step")
    averages = {value == 0 for key, value in pairs if key == "train.ema_decay"}
    if True in averages:
        faults.append("space: train.ema_decay 0 has no average to hand over; search values above 0")
    for name in ("max_steps", "max_minutes", "patience"):
        if getattr(space.base.train, name) is not None:
            faults.append(f"train.{name} may end a run before an epoch at which pbt exchanges; unset it")
    if not boundaries(space):
        faults.append(f"search.grace {space.search.grace} is not below train.epochs: there would be no exchange")
    if (space.points or 0) < 2:
        faults.append("search.samples: pbt needs at least 2 trials")
    return faults


def _combination_faults(space: Space) -> list[str]:
    faults: dict[str, None] = {}
    first = {axis.label: axis.domain.probes[0] for axis in space.axes}
    last = space.search.repeats - 1
    names = (*trial_names(space.base.name, LAST_POINT, space.search.repeats), best_name(space.base.name))
    longest = max(names, key=len)
    for values in itertools.chain(_combinations(space.axes), (first | point for point in space.search.points)):
        try:
            space.config(values, longest, repeat=last)
        except ConfigError as error:
            faults |= dict.fromkeys(str(error).split("\n  ")[1:])  # the first line only repeats the values
    return [f"space: {fault}" for fault in itertools.islice(faults, FAULTS_SHOWN)]


def _budget_faults(space: Space) -> list[str]:
    """Whether `search.epochs` has room for any point, of which the longest may be the first."""
    budget, needed = space.search.epochs, space.longest * space.search.repeats
    if budget is None or budget >= needed:
        return []
    return [f"search.epochs {budget} is less than one point needs: {needed}"]


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
        known = [*SpaceFile.model_fields, *(f"search.{name}" for name in (*Search.model_fields, "method"))]
        if fault["loc"][0] == "space":
            parent = ".".join(str(part) for part in fault["loc"][:-1])
            known = [f"{parent}.{kind}" for kind in KINDS]
        return f"{where}: unknown key; did you mean '{nearest(where, known)}'?"
    if fault["type"] == "model_type" and fault["loc"][0] == "space":
        return f"{where}: write what to search as {{choice: [...]}} or another of {', '.join(KINDS)}"
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}"
