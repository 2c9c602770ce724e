"""Ray Train's list of a run's checkpoints, made to agree with the folders that are there before a run goes on.

Ray keeps it in `checkpoint_manager_snapshot.json` and writes it in place, so a crash can cut it short; it does not
start if the list names a folder that is gone, and starts from nothing if the list is missing. `inspect_checkpoints`
reads and changes nothing; `repair` writes the list and removes half-written checkpoints. Only folders whose names have
the exact form that a run gives are ever listed or removed. A complete checkpoint is never removed, nor one that was
listed and then damaged: a file `<checkpoint>.damaged` beside it says why. Every change is logged. A repair that was
killed is finished by the next one. Raises CheckpointError if the run has checkpoints and not one of them is complete,
or one that another version of this code wrote.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from pipeline.checkpoint import STATE, TrainState, check_files
from pipeline.errors import CheckpointError, CheckpointVersionError
from pipeline.files.storage import (
    exists,
    file_sizes,
    join,
    move,
    read_bytes,
    remove,
    remove_unfinished_files,
    subfolders,
    write_bytes,
)
from pipeline.logs import get_logger
from pipeline.runs.evaluations import Evaluation, read_evaluations, write_evaluations
from pipeline.runs.record import CHECKPOINT_LIST as FILE
from pipeline.runs.record import CHECKPOINT_NAME as OWN_NAME
from pipeline.runs.record import PREFIX
from pipeline.training.saving import SCORE, report_metrics

log = get_logger("snapshot")
DAMAGED = ".damaged"  # after the name of what is set aside: Ray's list, or a checkpoint that was listed


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose files have the right sizes; whether their content is right is seen when they are read."""

    name: str  # of its folder
    state: TrainState


@dataclass(frozen=True)
class FoundCheckpoints:
    """What a run's folder holds, and what `repair` would do about it."""

    usable: list[Stored]  # can be resumed from, newest last
    listed: list[str]  # in Ray's list, in its order
    list_fault: str  # why Ray's list cannot be read; empty if it can, or if there is none
    lost: dict[str, str]  # in Ray's list, but cannot be used: why
    half_written: list[str]  # incomplete, with a name that only a run gives, and not known to have been listed
    left_alone: list[str]  # other folders `checkpoint_*`, complete or not


def inspect_checkpoints(folder: str, stored_before: bool = True) -> FoundCheckpoints:
    """Look at the checkpoints in the run's `folder` (path or URL) without changing anything.

    A complete checkpoint that is newer than those in the list was stored just before its run died: it is usable.

    Args:
        folder: the run's.
        stored_before: whether the run's record names a checkpoint. If not, and Ray has no list, half-written folders
            are what is left of the first upload, and the run has no checkpoint yet.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged or gone.
        CheckpointVersionError: one of them is of another version.
    """
    entries, fault = _read(folder)
    listed = [entry["checkpoint_dir_name"] for entry in entries or ()]
    names = [name for name in subfolders(folder) if name.startswith(PREFIX)]
    own = [name for name in names if name in listed or OWN_NAME.fullmatch(name)]
    complete, damaged = _look(folder, own)
    usable = _usable(complete, listed) if entries is not None else complete
    taken = {each.name for each in usable}
    lost = {name: damaged.get(name, "it is gone") for name in listed if name not in taken}
    if not usable and (lost or (damaged and entries is None and (stored_before or fault))):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in {**damaged, **lost}.items())
        raise CheckpointError(
            f"run {folder} has no complete checkpoint ({reasons}); bring one back or start again with a new name="
        )
    kept = {name.removesuffix(DAMAGED) for name in file_sizes(folder) if name.endswith(DAMAGED)}
    half_written = sorted({*damaged} - {*lost} - kept)
    left_alone = sorted({*names} - taken - {*lost} - {*half_written})
    return FoundCheckpoints(usable, listed, fault, lost, half_written, left_alone)


def repair(folder: str, stored_before: bool = True) -> list[Stored]:
    """Make Ray's list in the run's `folder` agree with the folders and their AP, and remove half-written checkpoints.

    Args and errors are those of `inspect_checkpoints`; after an error nothing was changed.

    Returns:
        The checkpoints that can be resumed from, newest last; empty if the run has none yet.
    """
    found = inspect_checkpoints(folder, stored_before)
    path = join(folder, FILE)
    if found.list_fault:
        log.warning("%s is damaged (%s); it is kept as %s%s and written anew", path, found.list_fault, FILE, DAMAGED)
        move(path, f"{path}{DAMAGED}")
    for name, reason in found.lost.items():
        log.warning("checkpoint %s is not resumed from: %s; going on from %s", name, reason, found.usable[-1].name)
        if exists(join(folder, name)):  # it was a checkpoint once: no later repair may take it for a half-written one
            write_bytes(join(folder, name + DAMAGED), reason.encode())
    evaluated = _evaluations(folder, found)
    entries = [] if found.list_fault else _read(folder)[0] or []
    old = {entry["checkpoint_dir_name"]: entry["metrics"] for entry in entries}
    metrics = {each.name: _metrics(each, old, evaluated) for each in found.usable}
    if metrics != old:
        _write(folder, metrics, _pending(folder) if entries else {})
    if metrics.keys() != old.keys():
        log.warning("%s was written anew: it lists %s", path, ", ".join(each.name for each in found.usable))
    for name in found.half_written:
        log.warning("removing %s, which is half-written", join(folder, name))
        remove(join(folder, name))
    remove_unfinished_files(folder)
    for name in found.left_alone:
        log.warning("%s is not in Ray's list of checkpoints and is left alone; nothing resumes from it", name)
    return found.usable


def _look(folder: str, names: Sequence[str]) -> tuple[list[Stored], dict[str, str]]:
    """Complete checkpoints by step, and what is wrong with each of the others."""
    complete, damaged = [], {}
    for name in names:
        try:
            sizes = file_sizes(join(folder, name))
            if STATE not in sizes:
                raise CheckpointError(f"{STATE} is missing")
            complete.append(Stored(name, check_files(read_bytes(join(join(folder, name), STATE)), sizes)))
        except CheckpointVersionError as error:
            raise CheckpointVersionError(f"{join(folder, name)}: {error}") from None
        except CheckpointError as error:
            damaged[name] = str(error)
    return sorted(complete, key=lambda each: each.state.global_step), damaged


def _read(folder: str) -> tuple[list[dict[str, Any]] | None, str]:
    """Ray's entries, or None if there is no list or it cannot be read; and why it cannot."""
    path = join(folder, FILE)
    if not exists(path):
        return None, ""
    try:
        document = json.loads(read_bytes(path))
        entries: list[dict[str, Any]] = document["checkpoint_results"]
        latest = document["latest_checkpoint_result"]
        if latest is not None and latest["checkpoint_dir_name"] not in [e["checkpoint_dir_name"] for e in entries]:
            raise ValueError("the newest checkpoint is not among the others")
        return entries, ""
    except (ValueError, KeyError, TypeError) as error:
        return None, repr(error)


def _pending(folder: str) -> dict[str, Any]:
    """What Ray noted about evaluation tasks that have not ended, by checkpoint."""
    document = json.loads(read_bytes(join(folder, FILE)))
    names = [entry["checkpoint_dir_name"] for entry in document.get("pending_training_results", ())]
    return dict(zip(names, document.get("pending_validation_specs", ()), strict=False))


def _usable(complete: Sequence[Stored], listed: Sequence[str]) -> list[Stored]:
    """Those in the list, and newer ones that were stored but not yet listed."""
    newest = max((each.state.global_step for each in complete if each.name in listed), default=-1)
    return [each for each in complete if each.name in listed or each.state.global_step > newest]


def _evaluations(folder: str, found: FoundCheckpoints) -> dict[str, Evaluation]:
    """The rows of `evaluations.json` by checkpoint, after two changes of the file.

    A lost checkpoint is no row's any more, or it could be the best one. What versions 1 to 3 kept in the states of
    checkpoints is taken over; each of them has the evaluations up to its own step.
    """
    before = read_evaluations(folder)
    rows = [replace(row, checkpoint="") if row.checkpoint in found.lost else row for row in before]
    for each in found.usable:
        known = {row.entry["step"] for row in rows}
        for entry in each.state.history:
            if "step" in entry and entry["step"] not in known:
                rows.append(Evaluation(each.name if entry["step"] == each.state.global_step else "", entry))
    if rows != before:
        write_evaluations(folder, rows)
    return {row.checkpoint: row for row in rows}


def _metrics(
    stored: Stored, old: Mapping[str, Mapping[str, Any]], evaluated: Mapping[str, Evaluation]
) -> dict[str, Any]:
    """What Ray's list is to have of a checkpoint: what it had, but the evaluation as it is in `evaluations.json`."""
    kept = {key: value for key, value in old.get(stored.name, {}).items() if not key.startswith("val/")}
    return kept | report_metrics(stored.state, evaluated.get(stored.name))


def _write(folder: str, known: Mapping[str, dict[str, Any]], pending: Mapping[str, Any]) -> None:
    """Ray's list in the layout of Ray 2.60: metrics by checkpoint in the order of the reports, and tasks to come."""
    results: dict[str, dict[str, Any]] = {
        name: {"version": 0, "checkpoint_dir_name": name, "metrics": metrics} for name, metrics in known.items()
    }
    order = [*known]
    ranked = sorted(order, key=lambda name: (known[name][SCORE], order.index(name)))
    document = {
        "ray_version": version("ray"),
        "checkpoint_results": [results[name] for name in ranked],
        "checkpoint_report_indices": [order.index(name) for name in ranked],
        "latest_checkpoint_result": results[order[-1]] if order else None,
        "pending_training_results": [results[name] for name in order if name in pending],
        "pending_validation_specs": [pending[name] for name in order if name in pending],
        "current_report_index": len(order),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    write_bytes(join(folder, FILE), json.dumps(document).encode())
