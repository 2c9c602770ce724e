"""Repair of Ray Train's list of a run's checkpoints, so that it agrees with the folders before a run continues.

Ray writes the list in place, so a crash can truncate it. Ray does not start if the list names a folder that is gone,
and it trains from scratch if the list is missing. `inspect_checkpoints` only reads. `repair` writes the list and
removes half-written checkpoints. Only folders with the exact form of a run's names are ever listed or removed. A
complete checkpoint is never removed, nor one that was listed and then damaged: a file `<checkpoint>.damaged` beside
it holds the reason. Every change is logged. The next repair finishes one that was killed. Raises CheckpointError if
the run has checkpoints and none of them is complete, or if one was written by another version of this code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from pipeline.launch.ray_internals import CheckpointList, format_checkpoint_list, parse_checkpoint_list
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
    """A checkpoint whose files have the right sizes. Their content is verified when they are read."""

    name: str  # of its folder
    state: TrainState


@dataclass(frozen=True)
class FoundCheckpoints:
    """The checkpoints in a run's folder, and what `repair` would do about them."""

    usable: list[Stored]  # can be resumed from, newest last
    listed: list[str]  # in Ray's list, in its order
    list_fault: str  # why Ray's list cannot be read; empty if it can, or if there is none
    lost: dict[str, str]  # in Ray's list but not usable, each with the reason
    half_written: list[str]  # incomplete, with a name that only a run gives, and not known to have been listed
    left_alone: list[str]  # other folders `checkpoint_*`, complete or not


def inspect_checkpoints(folder: str, stored_before: bool = True) -> FoundCheckpoints:
    """Inspect the checkpoints in the run's `folder` (path or URL) without changing anything.

    A complete checkpoint that is newer than those in the list was stored just before its run died, so it is usable.

    Args:
        folder: the run's.
        stored_before: whether the run's record names a checkpoint. If not, and Ray has no list, half-written folders
            are the rest of the first upload, and the run has no checkpoint yet.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged or gone.
        CheckpointVersionError: one of them is of another version.
    """
    content, fault = _read_list(folder)
    listed = [*content.metrics] if content else []
    names = [name for name in subfolders(folder) if name.startswith(PREFIX)]
    own = [name for name in names if name in listed or OWN_NAME.fullmatch(name)]
    complete, damaged = _check_each(folder, own)
    usable = _select_usable(complete, listed) if content else complete
    used = {each.name for each in usable}
    lost = {name: damaged.get(name, "it is gone") for name in listed if name not in used}
    if not usable and (lost or (damaged and content is None and (stored_before or fault))):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in {**damaged, **lost}.items())
        raise CheckpointError(
            f"run {folder} has no complete checkpoint ({reasons}); restore one of them or start a new run with name="
        )
    kept = {name.removesuffix(DAMAGED) for name in file_sizes(folder) if name.endswith(DAMAGED)}
    half_written = sorted({*damaged} - {*lost} - kept)
    left_alone = sorted({*names} - used - {*lost} - {*half_written})
    return FoundCheckpoints(usable, listed, fault, lost, half_written, left_alone)


def repair(folder: str, stored_before: bool = True) -> list[Stored]:
    """Make Ray's list in the run's `folder` agree with the folders and their AP, and remove half-written checkpoints.

    Arguments and errors are those of `inspect_checkpoints`; an error changes nothing.

    Returns:
        The checkpoints that can be resumed from, newest last; empty if the run has none yet.
    """
    found = inspect_checkpoints(folder, stored_before)
    path = join(folder, FILE)
    if found.list_fault:
        log.warning("%s is damaged (%s); it is renamed to %s%s and rebuilt", path, found.list_fault, FILE, DAMAGED)
        move(path, f"{path}{DAMAGED}")
    for name, reason in found.lost.items():
        log.warning("checkpoint %s cannot be used: %s; continuing from %s", name, reason, found.usable[-1].name)
        if exists(join(folder, name)):  # marked as once complete, so that no later repair removes it as half-written
            write_bytes(join(folder, name + DAMAGED), reason.encode())
    evaluated = _update_evaluations(folder, found)
    old = (None if found.list_fault else _read_list(folder)[0]) or CheckpointList({}, {})
    metrics = {each.name: _merge_metrics(each, old.metrics, evaluated) for each in found.usable}
    if metrics != old.metrics:
        write_bytes(path, format_checkpoint_list(CheckpointList(metrics, old.pending), SCORE))
    if metrics.keys() != old.metrics.keys():
        log.warning("%s was rebuilt: it lists %s", path, ", ".join(each.name for each in found.usable))
    for name in found.half_written:
        log.warning("removing %s, which is half-written", join(folder, name))
        remove(join(folder, name))
    remove_unfinished_files(folder)
    for name in found.left_alone:
        log.warning("%s is not in Ray's list of checkpoints; it is neither used nor removed", name)
    return found.usable


def _check_each(folder: str, names: Sequence[str]) -> tuple[list[Stored], dict[str, str]]:
    """Complete checkpoints by step, and the others by name, each with its fault."""
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


def _read_list(folder: str) -> tuple[CheckpointList | None, str]:
    """Ray's list, or None if there is none or it cannot be read; and why it cannot be read."""
    path = join(folder, FILE)
    if not exists(path):
        return None, ""
    try:
        return parse_checkpoint_list(read_bytes(path)), ""
    except (ValueError, KeyError, TypeError) as error:
        return None, repr(error)


def _select_usable(complete: Sequence[Stored], listed: Sequence[str]) -> list[Stored]:
    """The checkpoints in the list, and newer ones that were stored but not yet listed."""
    newest = max((each.state.global_step for each in complete if each.name in listed), default=-1)
    return [each for each in complete if each.name in listed or each.state.global_step > newest]


def _update_evaluations(folder: str, found: FoundCheckpoints) -> dict[str, Evaluation]:
    """The rows of `evaluations.json` by checkpoint, after two updates of the file.

    Rows of lost checkpoints lose the name of the checkpoint, so that it cannot be chosen as the best one. Versions 1 to
    3 kept the evaluations up to a checkpoint's step in its state; those are added as rows.
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


def _merge_metrics(
    stored: Stored, old: Mapping[str, Mapping[str, Any]], evaluated: Mapping[str, Evaluation]
) -> dict[str, Any]:
    """The metrics of a checkpoint for Ray's list: the old ones, with the evaluation from `evaluations.json`."""
    kept = {key: value for key, value in old.get(stored.name, {}).items() if not key.startswith("val/")}
    return kept | report_metrics(stored.state, evaluated.get(stored.name))
