"""`<run>/evaluations.json`: the COCO numbers of a run's checkpoints, one row each, oldest first.

The numbers are stored nowhere else; the detections are in the folder `results` beside the file. One process writes the
file, the control channel's actor on the driver's node, as soon as Ray has registered the checkpoint. Others read it to
find the best checkpoint, rank Ray's list and plot AP; they get the numbers of `verification.json` where pycocotools
found others. A damaged file is a RunError that names it.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from pipeline.errors import RunError
from pipeline.files.storage import join, read_bytes, write_bytes
from pipeline.logs import get_logger
from pipeline.runs.verifications import read_verdicts

FILE = "evaluations.json"
VERSION = 1
STORE_SECONDS = 60.0  # a caller's timeout for the writer
Entry = dict[str, float]  # epoch, step and the COCO numbers
SUBSET = "images"  # key of an entry that is of so many images only, not of all
History = tuple[Entry, ...]  # by step

log = get_logger("evaluations")


@dataclass(frozen=True)
class Evaluation:
    """One row: the name of the checkpoint's folder (empty if it can no longer be used), and its numbers."""

    checkpoint: str
    entry: Entry

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers by the names that Ray's report has: `val/AP`, ..., `val/epoch`, `val/step`."""
        return {f"val/{key}": value for key, value in self.entry.items()}


def from_report(checkpoint: str, metrics: Mapping[str, Any]) -> Evaluation | None:
    """The row that a report of Ray's holds, as `Evaluation.metrics` names it; None if it holds none."""
    entry = {key.removeprefix("val/"): value for key, value in metrics.items() if key.startswith("val/")}
    return Evaluation(checkpoint, entry) if "step" in entry else None


def results_file(folder: str, step: float) -> str:
    """The path of the detections of the evaluation after optimizer step `step`, as COCO results JSON."""
    return join(folder, f"results/step_{step:08.0f}.json")


def read_evaluations(folder: str) -> list[Evaluation]:
    """The rows of the run in `folder` (path or URL), oldest first; none if there is no file.

    Raises:
        RunError: it is damaged or of another version.
        OSError: the store does not give it.
    """
    path = join(folder, FILE)
    try:
        document = json.loads(read_bytes(path))
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']} instead of {VERSION}")
        return _verified(folder, [Evaluation(**row) for row in document["evaluations"]])
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged ({error!r}); move it away, and the AP of the checkpoints with it") from None


def _verified(folder: str, rows: list[Evaluation]) -> list[Evaluation]:
    """The rows, with pycocotools' numbers where a faster package gave others."""
    wrong = {verdict.step: verdict for verdict in read_verdicts(folder) if verdict.differences}
    return [
        replace(row, entry=row.entry | wrong[int(row.entry["step"])].metrics)
        if int(row.entry["step"]) in wrong and wrong[int(row.entry["step"])].scored.items() <= row.entry.items()
        else row
        for row in rows
    ]


def write_evaluations(folder: str, rows: Iterable[Evaluation]) -> None:
    """Write the rows, of which the last one of a step counts, by rename. Raises OSError."""
    by_step = {row.entry["step"]: row for row in rows}
    document = {"version": VERSION, "evaluations": [asdict(by_step[step]) for step in sorted(by_step)]}
    write_bytes(join(folder, FILE), json.dumps(document, indent=1).encode())


class Answer(Protocol):
    """Ray's reference to what a call to an actor returns."""

    def future(self) -> Future[None]:
        """The same, to be waited for without Ray."""


class RemoteWrite(Protocol):
    """The method of an actor that writes a row."""

    def remote(self, row: Evaluation) -> Answer:
        """Call it."""


class Writer(Protocol):
    """The handle of the actor that writes `evaluations.json`."""

    @property
    def record_evaluation(self) -> RemoteWrite:
        """Writes a row, with those that could not be written before."""


def store(writer: Writer, row: Evaluation) -> None:
    """Have `writer`, a handle of the ControlChannel, write a row. A failure is a warning; the next row retries."""
    try:
        # ray.get must not be called in Ray's controller
        writer.record_evaluation.remote(row).future().result(timeout=STORE_SECONDS)
    except Exception as error:  # a full disk, a store, Ray
        log.warning(
            "the evaluation of %s is not in %s yet: %s", row.checkpoint, FILE, str(error).strip() or repr(error)
        )


def read_history(folder: str, until: float) -> History:
    """The rows up to step `until`, for display; if the file cannot be read, no rows and a warning.

    Rows of later steps come from before the run resumed at an earlier checkpoint; those steps will run again.
    """
    try:
        return tuple(row.entry for row in read_evaluations(folder) if row.entry["step"] <= until)
    except (RunError, OSError) as error:
        log.warning("the AP so far is not shown: %s", error)
        return ()


def outcome(entry: Entry) -> str:
    """Format an entry as one line, with epochs counted from 1."""
    subset = f"  (only {entry[SUBSET]:.0f} images)" if SUBSET in entry else ""
    return f"epoch {entry['epoch'] + 1:.0f} evaluated: AP {entry['AP']:.4f}  AP50 {entry['AP50']:.4f}{subset}"
