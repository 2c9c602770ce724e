"""The record of a run, `<storage>/<name>/run.json`: its config, its checkpoints, its MLflow run, its end.

The record is written when a run starts, after each checkpoint and when the run ends. It holds names of checkpoints, not
paths, so that a run can be moved: a name is a folder beside the file. `evaluations.json` decides which checkpoint is
the best. The command line names a run by its folder, its `run.json`, or its bare name under `runs/`. A record that is
missing, damaged or of another version is a RunError.
"""

import copy
import dataclasses
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.files.sqlite_uri import sqlite_file, sqlite_uri
from pipeline.files.storage import exists, is_url, join, make_absolute, read_bytes, write_bytes
from pipeline.runs.evaluations import SUBSET, Evaluation, read_evaluations

VERSION = 2  # 1: with paths of the folder and the checkpoints, without digests of the data
READABLE = (1, 2)
FILE = "run.json"
IMPORTED = "IMPORTED"  # status of a run that was not trained here but made by `jobs.weights import`
PREFIX = "checkpoint_"  # of the checkpoints' folders in a run's folder
CHECKPOINT_NAME = re.compile(rf"{PREFIX}\d{{8,}}_[0-9a-f]{{8}}")  # as `training.saving` names them
CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"  # written by Ray Train


@dataclass(frozen=True)
class RunRecord:
    """The state of a run. Paths are absolute or URLs."""

    name: str
    folder: str  # where the record was found, or will be written
    config: dict[str, Any]
    run_id: str | None = None  # MLflow; None if the tracking server did not answer
    status: str = "RUNNING"  # RUNNING | FINISHED | FAILED | KILLED (Ctrl-C) | PREEMPTED (stopped early) | IMPORTED
    last: str | None = None  # newest checkpoint
    best: str | None = None  # checkpoint with the highest AP; not in the file
    metrics: dict[str, float] = field(default_factory=dict)  # of the best one: val/... (not in the file); and the speed
    stopped: str = ""  # why the run stopped early with checkpoint `last`; empty if it did not
    data: dict[str, str] = field(default_factory=dict)  # digest of the shards of `train` and `val`; empty in version 1

    @property
    def checkpoint(self) -> str:
        """The best checkpoint, else the last one. Raises RunError if there is none yet."""
        path = self.best or self.last
        if path is None:
            raise RunError(f"run {self.name} has no checkpoint yet; let it reach its first epoch's end")
        return path


def run_exists(folder: str) -> bool:
    """Whether `folder` (path or URL) holds a run record."""
    return exists(join(folder, FILE))


def read_run(run: str) -> RunRecord:
    """Read the record of `run` (folder, URL, run.json, or name under runs/), with its best checkpoint and AP.

    Raises:
        RunError: there is no such run, or its record or its evaluations are damaged.
    """
    return with_best(read_record(run))


def list_runs(storage: str) -> list[RunRecord]:
    """The runs in a local folder that have an evaluated checkpoint, by name; damaged ones are left out."""
    found = []
    for path in sorted(Path(storage).glob(f"*/{FILE}")):
        try:
            record = read_run(str(path.parent))
        except RunError:
            continue
        if record.best is not None and "val/AP" in record.metrics:
            found.append(record)
    return found


def with_best(record: RunRecord) -> RunRecord:
    """Add the best checkpoint and its AP from `evaluations.json`. Raises RunError if that is damaged."""
    row = best_evaluation(record)
    if row is None:
        return record  # version 0.1 wrote the best one into the record itself
    scores = {key: value for key, value in row.metrics.items() if key not in ("val/epoch", "val/step")}
    return replace(record, best=join(record.folder, row.checkpoint), metrics=scores | _speed(record.metrics))


def best_evaluation(record: RunRecord) -> Evaluation | None:
    """The row with the highest AP of a checkpoint that exists. Raises RunError if `evaluations.json` is damaged."""
    rows = [row for row in read_evaluations(record.folder) if row.checkpoint and row.entry["AP"] >= 0]
    # An AP of fewer images (`evaluation.max_images`) counts only if there is no other.
    ordered = sorted(rows, key=lambda r: (SUBSET not in r.entry, r.entry["AP"], r.entry["step"]), reverse=True)
    # Ray keeps the best ones, and the later one of equals
    return next((row for row in ordered if exists(join(record.folder, row.checkpoint))), None)


def read_record(run: str) -> RunRecord:
    """Read the file alone, see `read_run`. Raises RunError."""
    folders = [run.removesuffix(f"/{FILE}"), join("runs", run)]
    folder = next((f for f in folders if run_exists(f)), None)
    if folder is None:
        parent = Path(run).parent if "/" in run else Path("runs")
        known = ", ".join(sorted(p.parent.name for p in parent.glob(f"*/{FILE}"))) or "none"
        raise RunError(f"there is no run '{run}' (no {join(run, FILE)}); runs in {parent}: {known}")
    path = join(folder, FILE)
    try:
        document = json.loads(read_bytes(path))
        version = document.pop("version")
        if version not in READABLE:
            raise RunError(f"{path} has version {version}, this code reads {READABLE}; use the code that wrote it")
        return _parse(document, make_absolute(folder.rstrip("/")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r}); restore it from a copy, or name another run") from None


def write_run(record: RunRecord) -> None:
    """Write the record into its folder; a reader never sees half of it."""
    document = {"version": VERSION, **dataclasses.asdict(record)}
    del document["best"]
    document["metrics"] = _speed(record.metrics)
    inside = f"{document.pop('folder').rstrip('/')}/"
    document["last"] = record.last.removeprefix(inside) if record.last else None
    write_bytes(join(record.folder, FILE), json.dumps(document, indent=1).encode())


def _speed(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.startswith("val/")}


def _parse(document: dict[str, Any], folder: str) -> RunRecord:
    """Parse the record found in `folder`, to which it may have been moved."""
    config = document.pop("config")
    before = document.pop("folder", "") or _folder_of(config)
    for key in ("last", "best"):
        if path := document.get(key):
            name = path.removeprefix(f"{before}/") if before else path
            document[key] = name if is_url(name) or name.startswith("/") else join(folder, name)
    return RunRecord(folder=folder, config=with_store_beside(config, before, folder), **document)


def _folder_of(config: dict[str, Any]) -> str:
    """The folder of a run of this config; empty if the config does not name it."""
    return join(config["storage"], config["name"]) if "storage" in config and "name" in config else ""


def with_store_beside(config: dict[str, Any], before: str, folder: str) -> dict[str, Any]:
    """The config with the new path of the SQLite file, if it was moved with the run: its relative path is the same."""
    recorded = sqlite_file(config.get("tracking", {}).get("uri", ""))
    if (
        before == folder
        or recorded is None
        or not (recorded.is_absolute() and before.startswith("/") and folder.startswith("/"))
    ):
        return config
    database = os.path.normpath(join(folder, os.path.relpath(recorded, before)))
    if not exists(database):
        return config
    moved = copy.deepcopy(config)
    moved["tracking"]["uri"] = sqlite_uri(database)
    return moved
