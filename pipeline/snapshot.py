"""Ray Train's list of a run's checkpoints, made to agree with the folders that are there before a run goes on.

Ray keeps it in `checkpoint_manager_snapshot.json` and writes it in place, so a crash can cut it short; it does not
start if the list names a folder that is gone, and starts from nothing if the list is missing. `driver.py` calls
`repair` before it resumes. Every change is said in the log, and a folder that cannot be used is named. Raises
CheckpointError if the run has checkpoints and not one of them is complete, or one that another version of this code
wrote, which is neither gone on from nor removed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.checkpoint import STATE, TrainState, check_files
from pipeline.errors import CheckpointError, CheckpointVersionError
from pipeline.runtime import get_logger
from pipeline.storage import exists, file_sizes, join, move, read_bytes, remove, subfolders, write_bytes
from pipeline.training.saving import PREFIX, SCORE, report_metrics

log = get_logger("snapshot")
FILE = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose files have the right sizes; whether their content is right is seen when they are read."""

    name: str  # of its folder
    state: TrainState


def repair(folder: str) -> list[Stored]:
    """Mend Ray's list in the run's `folder` (path or URL), and remove half-written checkpoints that it never named.

    A complete checkpoint that is newer than those in the list was stored just before its run died: it is taken in.

    Returns:
        The checkpoints that can be resumed from, newest last; empty if the run has none yet.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged or gone.
        CheckpointVersionError: one of them is of another version.
    """
    complete, damaged = _look(folder)
    entries = _read(folder)
    listed = [entry["checkpoint_dir_name"] for entry in entries or ()]
    lost = {name: damaged.get(name, "it is gone") for name in listed if name not in {c.name for c in complete}}
    known = _usable(complete, listed) if entries is not None else complete
    if not known and (damaged or lost):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in {**damaged, **lost}.items())
        raise CheckpointError(
            f"run {folder} has no complete checkpoint ({reasons}); bring one back or start again with a new name="
        )
    for name, reason in lost.items():
        log.warning("checkpoint %s is not resumed from: %s; going on from %s", name, reason, known[-1].name)
    if {c.name for c in known} != {*listed}:
        _write(folder, known, entries or (), _pending(folder) if entries else {})
        log.warning("%s was mended: it lists %s", join(folder, FILE), ", ".join(c.name for c in known))
    for name in sorted({*damaged, *(c.name for c in complete)} - {c.name for c in known} - {*lost}):
        log.warning("removing %s, which is half-written or no longer kept", join(folder, name))
        remove(join(folder, name))
    return known


def _look(folder: str) -> tuple[list[Stored], dict[str, str]]:
    """Complete checkpoints by step, and what is wrong with each of the others."""
    complete, damaged = [], {}
    for name in subfolders(folder):
        if not name.startswith(PREFIX):
            continue
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


def _read(folder: str) -> list[dict[str, Any]] | None:
    """Ray's entries, or None if there is no list that can be read; a damaged one is moved aside."""
    path = join(folder, FILE)
    if not exists(path):
        return None
    try:
        document = json.loads(read_bytes(path))
        entries: list[dict[str, Any]] = document["checkpoint_results"]
        latest = document["latest_checkpoint_result"]
        if latest is not None and latest["checkpoint_dir_name"] not in [e["checkpoint_dir_name"] for e in entries]:
            raise ValueError("the newest checkpoint is not among the others")
        return entries
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%r); it is kept as %s.damaged and written anew", path, error, FILE)
        move(path, f"{path}.damaged")
        return None


def _pending(folder: str) -> dict[str, Any]:
    """What Ray noted about evaluation tasks that have not ended, by checkpoint."""
    document = json.loads(read_bytes(join(folder, FILE)))
    names = [entry["checkpoint_dir_name"] for entry in document.get("pending_training_results", ())]
    return dict(zip(names, document.get("pending_validation_specs", ()), strict=False))


def _usable(complete: Sequence[Stored], listed: Sequence[str]) -> list[Stored]:
    """Those in the list, and newer ones that were stored but not yet listed."""
    newest = max((each.state.global_step for each in complete if each.name in listed), default=-1)
    return [each for each in complete if each.name in listed or each.state.global_step > newest]


def _write(
    folder: str, known: Sequence[Stored], entries: Sequence[Mapping[str, Any]], pending: Mapping[str, Any]
) -> None:
    """Ray's list of `known`, in the layout of Ray 2.60; metrics of entries that were in it stay, and tasks to come."""
    old = {entry["checkpoint_dir_name"]: entry["metrics"] for entry in entries}
    results: dict[str, dict[str, Any]] = {
        each.name: {
            "version": 0,
            "checkpoint_dir_name": each.name,
            "metrics": old.get(each.name) or report_metrics(each.state),
        }
        for each in known
    }
    order = [each.name for each in known]  # of the reports
    ranked = sorted(order, key=lambda name: (results[name]["metrics"].get(SCORE, -1.0), order.index(name)))
    document = {
        "ray_version": ray.__version__,
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
