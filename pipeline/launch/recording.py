"""Updates a run's `run.json` and `evaluations.json` after each new checkpoint, from Ray's controller process.

A file that cannot be written is a warning, because Ray has the checkpoint.
"""

from dataclasses import replace
from typing import Any

from ray.train import UserCallback

from pipeline.files.storage import join
from pipeline.logs import get_logger
from pipeline.runs.evaluations import Writer, from_report, store
from pipeline.runs.record import RunRecord, write_run
from pipeline.training.saving import STOPPED

log = get_logger("recording")


class RecordCallback(UserCallback):
    """Writes each checkpoint that Ray has stored into the run's record, and its AP into `evaluations.json`.

    The record's file is never read: no other process writes it during the run, and if it was removed it is written
    again.

    Args:
        record: as the driver has written it.
        writer: handle of the run's ControlChannel.
    """

    def __init__(self, record: RunRecord, writer: Writer) -> None:
        self._record, self._writer = record, writer

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray after it has registered the checkpoint."""
        if checkpoint is None:
            return
        name, report = checkpoint.path.rpartition("/")[2], metrics[0]  # Ray's paths in a store lack the URL's scheme
        if row := from_report(name, report):
            store(self._writer, row)
        last, stopped = join(self._record.folder, name), report.get(STOPPED, "")
        speed = {key: value for key, value in report.items() if key.startswith("perf/")}
        self._record = replace(self._record, last=last, stopped=stopped, metrics=speed)
        try:
            write_run(self._record)
        except OSError as error:  # a full disk; Ray has the checkpoint, and a resumed run finds it
            log.warning("cannot write the record of run %s: %s", self._record.folder, error)
