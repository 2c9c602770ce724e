"""When an evaluation is due, also for a run that was stopped before it came to it."""

from dataclasses import replace

import pytest

from pipeline.checkpoint import TrainState
from pipeline.evaluation.inline import entry_of, is_due

STEPS_PER_EPOCH = 4
STATE = TrainState({}, (), "digest", 0, 0, 0, 0)


def after(steps: int) -> TrainState:
    """The state when so many steps are done."""
    epoch, step = divmod(steps, STEPS_PER_EPOCH)
    return replace(STATE, epoch=epoch, step=step, global_step=steps)


@pytest.mark.parametrize("eval_epochs", [1, 2, 3])
@pytest.mark.parametrize("total", [12, 10, 5])
def test_is_due_at_every_nth_epoch_and_at_the_end(eval_epochs: int, total: int) -> None:
    due = {steps for steps in range(total + 1) if is_due(after(steps), eval_epochs, total)}
    assert due == {*range(eval_epochs * STEPS_PER_EPOCH, total + 1, eval_epochs * STEPS_PER_EPOCH), total}


@pytest.mark.parametrize(("steps", "epoch"), [(1, 0), (4, 0), (5, 1), (8, 1)])
def test_entry_of_names_the_epoch_of_the_weights(steps: int, epoch: int) -> None:
    assert entry_of(after(steps), {"AP": 0.5}) == {"epoch": epoch, "step": steps, "AP": 0.5}
