"""What rank 0 knows of the evaluations that Ray tasks do beside it (`validating.py`): what they found, what waits.

`worker.py` has one when it does not evaluate inline.
"""

import time

from pipeline.logs import get_logger
from pipeline.runs.evaluations import History, read_history

log = get_logger("worker")
LOOK_SECONDS = 5.0  # between two looks for what tasks have found
BACKLOG = 4  # evaluations that wait, from which on it is said


class TaskEvaluations:
    """The evaluation tasks of the run in `folder`, seen from rank 0."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._looked = 0.0  # when, on the monotonic clock
        self._sent: list[int] = []  # steps of the checkpoints that tasks are to evaluate

    def look(self, known: History, step: int) -> History:
        """What tasks have found up to optimizer step `step`; `known` if the last look was just now."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return known
        self._looked = now
        return read_history(self._folder, step)

    def sent(self, known: History, step: int) -> None:
        """Count the checkpoint of `step`, which a task is to evaluate, and warn if too many wait."""
        done = {entry["step"] for entry in known}
        self._sent = [each for each in [*self._sent, step] if each not in done]
        if len(self._sent) == BACKLOG:
            log.warning(
                "%d evaluations wait for a task: one takes longer than the training between two, and each keeps its "
                "checkpoint in the storage; raise train.eval_epochs or set evaluation.where=inline",
                len(self._sent),
            )
