"""The record of a run, `<storage>/<name>/run.json`: where its config, checkpoints and MLflow run are.

Written by `driver.py` when a run starts, after each checkpoint is known and when it ends; read by `jobs.evaluate`,
`jobs.register`, `jobs.predict` and `--resume`. A run is named on the command line by its folder, its `run.json`, or its
bare name under `runs/`.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import RunError

VERSION = 1
FILE = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """What a finished or broken run left behind. Paths are absolute or URLs."""

    name: str
    folder: str
    config: dict[str, Any]
    run_id: str | None = None  # MLflow; None if the tracking server did not answer
    status: str = "RUNNING"  # RUNNING | FINISHED | FAILED
    last: str | None = None  # newest checkpoint
    best: str | None = None  # checkpoint with the highest val/AP
    metrics: dict[str, float] = field(default_factory=dict)  # of the best checkpoint
    version: int = VERSION

    @property
    def checkpoint(self) -> str:
        """The best checkpoint, else the last. Raises RunError if there is none yet."""
        path = self.best or self.last
        if path is None:
            raise RunError(f"run {self.name} has no checkpoint yet; let it reach its first epoch's end")
        return path


def read_run(run: str) -> RunRecord:
    """The record of `run` (folder, run.json, or name under runs/). Raises RunError if there is none."""
    candidates = [Path(run), Path(run) / FILE, Path("runs") / run / FILE]
    path = next((p for p in candidates if p.name == FILE and p.is_file()), None)
    if path is None:
        folder = Path(run).parent if os.sep in run else Path("runs")
        known = sorted(p.parent.name for p in folder.glob(f"*/{FILE}"))
        raise RunError(f"there is no run '{run}' (no {candidates[1]}); runs in {folder}: {', '.join(known) or 'none'}")
    try:
        record = json.loads(path.read_text())
        if record["version"] != VERSION:
            raise RunError(
                f"{path} has version {record['version']}, this code reads {VERSION}; use the code that wrote it"
            )
        return RunRecord(**record)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is not a run record: {error}") from None


def write_run(record: RunRecord) -> None:
    """Write the record into its folder, by rename, so that a reader never sees half of it."""
    folder = Path(record.folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(dataclasses.asdict(record), indent=1))
    temporary.replace(folder / FILE)
