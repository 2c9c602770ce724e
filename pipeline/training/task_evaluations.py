"""Rank 0's view of the evaluations that Ray tasks run beside the training: their results and their backlog.

The results come from the run's `evaluations.json`; if it cannot be read, a warning says so and the history is empty.
"""

import time

from pipeline.logs import get_logger
from pipeline.runs.evaluations import History, read_history

log = get_logger("worker")
POLL_SECONDS = 5.0  # between two reads of the results
BACKLOG_EVALUATIONS = 4  # so many pending evaluations are worth a warning


class TaskEvaluations:
    """The evaluation tasks of the run in `folder`, seen from rank 0."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._read_at = 0.0  # monotonic clock
        self._submitted: list[int] = []  # steps of the checkpoints that wait for their evaluation

    def merge_new_results(self, known: History, step: int) -> History:
        """The results of tasks up to optimizer step `step`; `known` if they were read a moment ago."""
        now = time.monotonic()
        if now - self._read_at < POLL_SECONDS:
            return known
        self._read_at = now
        return read_history(self._folder, step)

    def note_submitted(self, known: History, step: int) -> None:
        """Count the checkpoint of `step`, which a task is to evaluate, and warn if too many wait."""
        done = {entry["step"] for entry in known}
        self._submitted = [each for each in [*self._submitted, step] if each not in done]
        if len(self._submitted) == BACKLOG_EVALUATIONS:
            log.warning(
                "%d evaluations wait for a task: one takes longer than the training between two, and each keeps its "
                "checkpoint in the storage; raise train.eval_epochs or set evaluation.where=inline",
                len(self._submitted),
            )
