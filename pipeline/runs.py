"""The record of a run, `<storage>/<name>/run.json`: where its config, checkpoints and MLflow run are.

Written by `driver.py` when a run starts, after each checkpoint is known and when it ends; read by `jobs.evaluate`,
`jobs.register`, `jobs.predict` and `--resume`. A run is named on the command line by its folder, its `run.json`, or its
bare name under `runs/`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.storage import exists, join, read_bytes, write_bytes

VERSION = 1
FILE = "run.json"
IMPORTED = "IMPORTED"  # status of a run that was never trained here: `jobs.weights import` made it


@dataclass(frozen=True)
class RunRecord:
    """What a finished or broken run left behind. Paths are absolute or URLs."""

    name: str
    folder: str
    config: dict[str, Any]
    run_id: str | None = None  # MLflow; None if the tracking server did not answer
    status: str = "RUNNING"  # RUNNING | FINISHED | FAILED | KILLED (Ctrl-C) | PREEMPTED (told to leave) | IMPORTED
    last: str | None = None  # newest checkpoint
    best: str | None = None  # checkpoint with the highest val/AP
    metrics: dict[str, float] = field(default_factory=dict)  # of the best checkpoint
    stopped: str = ""  # why the run left early with `last`, if it did
    version: int = VERSION

    @property
    def checkpoint(self) -> str:
        """The best checkpoint, else the last. Raises RunError if there is none yet."""
        path = self.best or self.last
        if path is None:
            raise RunError(f"run {self.name} has no checkpoint yet; let it reach its first epoch's end")
        return path


def run_exists(folder: str) -> bool:
    """Whether `folder` (path or URL) holds a run record."""
    return exists(join(folder, FILE))


def read_run(run: str) -> RunRecord:
    """The record of `run` (folder, URL, run.json, or name under runs/). Raises RunError if there is none."""
    folders = [run.removesuffix(f"/{FILE}"), join("runs", run)]
    folder = next((f for f in folders if run_exists(f)), None)
    if folder is None:
        parent = Path(run).parent if "/" in run else Path("runs")
        known = ", ".join(sorted(p.parent.name for p in parent.glob(f"*/{FILE}"))) or "none"
        raise RunError(f"there is no run '{run}' (no {join(run, FILE)}); runs in {parent}: {known}")
    path = join(folder, FILE)
    try:
        document = json.loads(read_bytes(path))
        if document["version"] != VERSION:
            raise RunError(
                f"{path} has version {document['version']}, this code reads {VERSION}; use the code it is from"
            )
        return RunRecord(**document)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is not a run record: {error}") from None


def write_run(record: RunRecord) -> None:
    """Write the record into its folder, by rename, so that a reader never sees half of it."""
    write_bytes(join(record.folder, FILE), json.dumps(dataclasses.asdict(record), indent=1).encode())
