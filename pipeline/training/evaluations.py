"""`<run>/evaluations.json`: what evaluation tasks found, one row per checkpoint that they scored, oldest first.

`scoring.py` adds to it, one task at a time; rank 0 (`worker.py`), `recording.py` and the driver read it, because Ray
tells the result of a task to nobody but its own list of checkpoints. Training does without a file that cannot be read.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from pipeline.storage import join, read_bytes, write_bytes

FILE = "evaluations.json"
VERSION = 1
History = tuple[dict[str, float], ...]

log = logging.getLogger("pipeline.evaluations")  # not by `runtime`, which imports torch


@dataclass(frozen=True)
class Evaluation:
    """One row: the name of the checkpoint's folder, and its entry of `TrainState.history`."""

    checkpoint: str
    entry: dict[str, float]  # epoch, step and the COCO numbers


def read_evaluations(folder: str) -> list[Evaluation]:
    """The rows of the run in `folder` (path or URL); none if there is no file, and after a warning if it is damaged."""
    path = join(folder, FILE)
    try:
        document = json.loads(read_bytes(path))
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']} instead of {VERSION}")
        return [Evaluation(**row) for row in document["evaluations"]]
    except FileNotFoundError:
        return []
    except Exception as error:  # each store has its own family of errors
        log.warning("%s cannot be read, the AP in it is not shown: %r", path, error)
        return []


def add_evaluation(folder: str, new: Evaluation) -> None:
    """Add a row, or replace the one of the same step. Raises what the store raises."""
    rows = [row for row in read_evaluations(folder) if row.entry["step"] != new.entry["step"]]
    rows = sorted([*rows, new], key=lambda row: row.entry["step"])
    document = {"version": VERSION, "evaluations": [asdict(row) for row in rows]}
    write_bytes(join(folder, FILE), json.dumps(document, indent=1).encode())


def outcome(entry: Mapping[str, float]) -> str:
    """An entry of the history in one line; people count epochs from 1."""
    return f"epoch {entry['epoch'] + 1:.0f} evaluated: AP {entry['AP']:.4f}  AP50 {entry['AP50']:.4f}"


def merged(history: Sequence[dict[str, float]], found: Iterable[Evaluation], until: float) -> History:
    """`history` and the rows of `found` up to step `until`, by step, each step once.

    A row of a later step is of a run that was stopped and went on from an earlier checkpoint: it will come again.
    """
    by_step = {row.entry["step"]: row.entry for row in found} | {entry["step"]: entry for entry in history}
    return tuple(by_step[step] for step in sorted(by_step) if step <= until)
