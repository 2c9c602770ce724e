"""What a rank knows of the evaluations that Ray tasks do beside it (`validating.py`): what they found, what waits.

`worker.py` has one when it does not evaluate inline.
"""

import time
from dataclasses import replace

from pipeline.checkpoint import TrainState
from pipeline.runtime import get_logger
from pipeline.training.evaluations import merged, read_evaluations
from pipeline.training.saving import Saver

log = get_logger("worker")
LOOK_SECONDS = 5.0  # between two looks for what tasks have found
BACKLOG = 4  # evaluations that wait, from which on it is said


class TaskEvaluations:
    """The evaluation tasks of the run in `folder`, seen from rank 0."""

    def __init__(self, folder: str, saver: Saver) -> None:
        self._folder, self._saver = folder, saver
        self._looked = 0.0  # when, on the monotonic clock
        self._sent: list[int] = []  # steps of the checkpoints that tasks are to evaluate
        self._unlisted = False  # they had found something then, so Ray may have removed a checkpoint since

    def taken(self, state: TrainState) -> TrainState:
        """`state` with what tasks have found since the last look."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return state
        self._looked = now
        if self._unlisted:
            self._saver.refresh()
        history = merged(state.history, read_evaluations(self._folder), state.global_step)
        self._unlisted = any(entry not in state.history for entry in history)
        if not self._unlisted:
            return state
        metrics = {key: value for key, value in history[-1].items() if key not in ("epoch", "step")}
        return replace(state, metrics=metrics, history=history)

    def sent(self, state: TrainState) -> None:
        """Count the checkpoint of `state`, which a task is to evaluate, and warn if too many wait."""
        done = {entry["step"] for entry in state.history}
        self._sent = [step for step in [*self._sent, state.global_step] if step not in done]
        if len(self._sent) == BACKLOG:
            log.warning(
                "%d evaluations wait for a task: one takes longer than the training between two, and each keeps its "
                "checkpoint in the storage; raise train.eval_epochs or set evaluation.where=inline",
                len(self._sent),
            )
