"""All checks of a sweep that need no Ray: data, name, the ledger of a sweep to continue, weights, disk, MLflow.

Nothing is written. Every fault is an InputError.
"""

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import Config, flatten
from pipeline.data.index import ShardIndex
from pipeline.data.sharding.summary import load_summary
from pipeline.errors import ConfigError, InputError, RunError
from pipeline.files import storage
from pipeline.files.atomic import UNFINISHED
from pipeline.files.folder_lock import FILE as LOCK
from pipeline.files.folder_lock import find_owner, in_use, read_owner
from pipeline.launch import preflight
from pipeline.launch.resume_check import Resume
from pipeline.runs.record import RunRecord
from tune.search.ledger import FILE, Ledger, check_same_space, new_ledger, read_ledger
from tune.space import Axis, Space
from tune.trials.on_disk import recover

# Settings that decide which shards a trial reads and whether they fit, and which weights it starts from.
READS_DATA = {"data.train", "data.val", "data.labels", "data.tail", "data.balance", "train.global_batch"}
READS_WEIGHTS = {"model.init_from", "model.backbone.weights"}


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep that has passed all checks."""

    space: Space  # paths absolute, MLflow store resolved, `storage` = the sweep's folder
    ledger: Ledger  # of the sweep that is continued, or a new one
    stored: Ledger | None = None  # as it is on disk; None for a new sweep


def check_sweep(space: Space, resume: Resume = "no") -> CheckedSweep:
    """Check everything that needs no Ray, cheap checks first.

    Raises:
        InputError: the sweep cannot start or continue.
    """
    space = make_paths_absolute(space)
    base = space.base
    preflight.check_storage(base.storage)
    indexes = preflight.check_data(base)
    check_metric(space, indexes[1])
    digests = {split: index.digest for split, index in zip(("train", "val"), indexes, strict=True)}
    folder = storage.join(base.storage, base.name)
    stored = ledger = find_ledger(folder, resume)
    if ledger:
        check_same_space(ledger, space, digests, folder)
        ledger = recover(space, ledger, folder)
    preflight.check_start(base, new=ledger is None)
    check_values(space, new=ledger is None)
    previous = RunRecord(base.name, folder, ledger.config, ledger.run_id) if ledger else None
    base = preflight.with_store(base, preflight.check_tracking(base, previous))
    space = replace(space, base=base.model_copy(update={"storage": folder}))
    return CheckedSweep(space, ledger or new_ledger(space, digests), stored)


def make_paths_absolute(space: Space) -> Space:
    """The space with local paths made absolute against the current folder, because trials run in another one."""
    first = {axis.label: axis.domain.probes[0] for axis in space.axes}

    def absolute(axis: Axis, value: Any) -> dict[str, Any]:
        config = space.config(first | {axis.label: value}, space.base.name)
        before, after = flatten(config), flatten(preflight.make_paths_absolute(config))
        return {key: given if before[key] == after[key] else after[key] for key, given in axis.settings(value).items()}

    axes, points = [], [dict(point) for point in space.search.points]
    for axis in space.axes:
        if axis.bundles:
            axes.append(replace(axis, bundles={name: absolute(axis, name) for name in axis.bundles}))
            continue
        listed = {kind: values for kind in ("choice", "grid") if (values := getattr(axis.domain, kind)) is not None}
        changed = {
            kind: tuple(absolute(axis, each)[axis.keys[0]] for each in values) for kind, values in listed.items()
        }
        domain = axis.domain.model_copy(update=changed)
        for point in points:
            if axis.domain.values and domain.values and axis.label in point:
                point[axis.label] = domain.values[axis.domain.values.index(point[axis.label])]
        axes.append(replace(axis, domain=domain))
    search = space.search.model_copy(update={"points": tuple(points)})
    return Space(preflight.make_paths_absolute(space.base), search, tuple(axes))


def check_values(space: Space, new: bool) -> None:
    """Check the shards and initial weights that values of the space name.

    Args:
        space: paths absolute.
        new: whether the trials start from the initial weights.

    Raises:
        InputError: a trial with such a value could not start.
    """
    first = {axis.label: axis.domain.probes[0] for axis in space.axes}
    for axis in space.axes:
        for value in axis.domain.probes:
            keys, config = axis.settings(value).keys(), space.config(first | {axis.label: value}, space.base.name)
            try:
                if keys & READS_DATA:
                    preflight.check_data(config)
                if new and _reads_weights(config, keys):
                    preflight.count_parameters(config, load=True)
            except InputError as error:
                raise ConfigError(f"space: {axis.label}: {value}: {error}") from None


def check_metric(space: Space, val: ShardIndex) -> None:
    """Refuse a metric that no trial can have, because validation has no object of that size.

    Raises:
        ConfigError: with the size.
        ShardError: a record cannot be read.
    """
    size = space.search.metric.partition("_")[2]
    if size and not getattr(load_summary(val), size):
        raise ConfigError(
            f"search.metric: {val.folder} has no {size} objects, so {space.search.metric} would never have a value"
        )


def _reads_weights(config: Config, keys: Set[str]) -> bool:
    """Whether values of these keys decide which weights a trial starts from, or whether they fit."""
    shapes = ("model.",) if config.model.init_from else ("model.backbone.",)
    return bool(keys & READS_WEIGHTS) or any(key.startswith(shapes) for key in keys)


def find_ledger(folder: str, resume: Resume) -> Ledger | None:
    """The ledger of the sweep to continue; None if a new one may use the folder.

    Raises:
        RunError: another process runs the sweep, the folder is in use, there is no sweep to continue, or its ledger
            cannot be read.
    """
    try:
        owner = read_owner(folder) if resume == "no" else find_owner(folder)
        there, ledger = _is_in_use(folder), read_ledger(folder)
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error}; check storage= and your access") from None
    if owner and (owner.is_alive or resume != "no"):
        raise RunError(in_use(folder, owner))
    if resume == "no" and there:
        last = f", {owner} ran it last" if owner else ""
        advice = "continue it with --resume, " if ledger else ""
        raise RunError(f"sweep {folder} exists already{last}; {advice}choose another name= or remove the folder")
    if ledger is None and there:
        raise RunError(f"--resume: {folder} has no {FILE}; choose another name= for the sweep or remove the folder")
    if ledger is None and resume == "must":
        raise RunError(f"--resume: there is no sweep {folder}; drop --resume to start it, or give its name=")
    return ledger


def _is_in_use(folder: str) -> bool:
    """Whether there is more in the folder than a sweep leaves that was killed before its first write."""
    return bool(storage.subfolders(folder)) or any(
        not UNFINISHED.match(name) for name in storage.file_sizes(folder) if name != LOCK
    )
