"""A run's `run.json` and `evaluations.json` follow each new checkpoint, from within Ray's controller process."""

from dataclasses import replace
from typing import Any

from ray.train import UserCallback

from pipeline.files.storage import join
from pipeline.logs import get_logger
from pipeline.runs.evaluations import from_report, store
from pipeline.runs.record import RunRecord, write_run
from pipeline.training.saving import STOPPED

log = get_logger("recording")


class RecordCallback(UserCallback):
    """Writes what Ray has just stored into the run's record, and its AP into `evaluations.json`.

    The record's file is never read: nobody else writes it while the run lasts, and it comes again if somebody removes
    it.

    Args:
        record: as the driver has written it.
        writer: the run's `stopping.ControlChannel`.
    """

    def __init__(self, record: RunRecord, writer: Any) -> None:
        self._record, self._writer = record, writer

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray after it has registered the checkpoint."""
        if checkpoint is None:
            return
        name, report = checkpoint.path.rpartition("/")[2], metrics[0]  # the path of a store lacks the URL's beginning
        if row := from_report(name, report):
            store(self._writer, row)
        last, stopped = join(self._record.folder, name), report.get(STOPPED, "")
        speed = {key: value for key, value in report.items() if key.startswith("perf/")}
        self._record = replace(self._record, last=last, stopped=stopped, metrics=speed)
        try:
            write_run(self._record)
        except OSError as error:  # a full disk: Ray has the checkpoint, and a resumed run finds it there
            log.warning("cannot write the record of run %s: %s", self._record.folder, error)
