"""`run.json` kept at the newest and the best checkpoint; runs in Ray's controller process, set up by `driver.py`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.train import UserCallback

from pipeline.evaluation.coco import METRICS
from pipeline.runs import RunRecord, write_run
from pipeline.runtime import get_logger
from pipeline.storage import join
from pipeline.training.evaluations import read_evaluations
from pipeline.training.saving import NO_AP, SCORE, STOPPED

log = get_logger("recording")


class RecordCallback(UserCallback):
    """Writes what Ray has just stored into the run's record.

    The file is never read: nobody else writes it while the run lasts, and it comes again if somebody removes it.

    Args:
        record: as the driver has written it.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._reported: dict[str, dict[str, Any]] = {}

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray after it has registered the checkpoint; of what tasks evaluated since, it does not say it."""
        if checkpoint is not None:
            name = checkpoint.path.rpartition("/")[2]  # the path of a store lacks the URL's beginning
            self._reported[name] = metrics[0]
            self._record = with_scores(updated(self._record, name, metrics[0]), self._evaluated())
            try:
                write_run(self._record)
            except OSError as error:  # a full disk: Ray has the checkpoint, and a resumed run finds it there
                log.warning("cannot write the record of run %s: %s", self._record.folder, error)

    def _evaluated(self) -> dict[str, dict[str, Any]]:
        found = read_evaluations(self._record.folder)
        scores = {row.checkpoint: {f"val/{key}": row.entry[key] for key in METRICS} for row in found}
        return {name: self._reported[name] | values for name, values in scores.items() if name in self._reported}


def updated(record: RunRecord, name: str, metrics: dict[str, Any]) -> RunRecord:
    """The record with checkpoint `name` as the last, and as the best if its AP is not below the best so far."""
    record = replace(record, last=join(record.folder, name), stopped=metrics.get(STOPPED, ""))
    return with_scores(record, {name: metrics})


def with_scores(record: RunRecord, known: Mapping[str, Mapping[str, Any]]) -> RunRecord:
    """The record with the best of its best checkpoint and `known`: reported metrics by folder name, oldest first.

    Of equals the later one is the best, as Ray keeps it; one that was not evaluated is none.
    """
    for name, metrics in known.items():
        score = metrics.get(SCORE, NO_AP)
        if score > NO_AP and score >= record.metrics.get(SCORE, NO_AP):
            values = {key: value for key, value in metrics.items() if "/" in key}
            record = replace(record, best=join(record.folder, name), metrics=values)
    return record
