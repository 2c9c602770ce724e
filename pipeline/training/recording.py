"""`run.json` kept at the newest and the best checkpoint; runs in Ray's controller process, set up by `driver.py`."""

from dataclasses import replace
from typing import Any

from ray.train import UserCallback

from pipeline.runs import RunRecord, read_run, write_run
from pipeline.runtime import get_logger
from pipeline.storage import join
from pipeline.training.saving import NO_AP, SCORE, STOPPED

log = get_logger("recording")


class RecordCallback(UserCallback):
    """Writes what Ray has just stored into the record of the run in `folder`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray after it has registered the checkpoint."""
        if checkpoint is not None:
            name = checkpoint.path.rpartition("/")[2]  # the path of a store lacks the URL's beginning
            try:
                write_run(updated(read_run(self._folder), name, metrics[0]))
            except OSError as error:  # a full disk: Ray has the checkpoint, and a resumed run finds it there
                log.warning("cannot write the record of run %s: %s", self._folder, error)


def updated(record: RunRecord, name: str, metrics: dict[str, Any]) -> RunRecord:
    """The record with checkpoint `name` as the last, and as the best if its AP is not below the best so far."""
    path = join(record.folder, name)
    record = replace(record, last=path, stopped=metrics.get(STOPPED, ""))
    values = {key: value for key, value in metrics.items() if "/" in key}
    if values[SCORE] > NO_AP and values[SCORE] >= record.metrics.get(SCORE, NO_AP):
        record = replace(record, best=path, metrics=values)
    return record
