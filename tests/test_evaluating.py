"""When an evaluation is due, also for a run that was stopped before it came to it."""

from dataclasses import replace

import pytest

from pipeline.checkpoint import TrainState
from pipeline.training.evaluating import is_due

STEPS_PER_EPOCH = 4
STATE = TrainState({}, (), "digest", 0, 0, 0, 0)


def after(steps: int) -> TrainState:
    """The state when so many steps are done."""
    epoch, step = divmod(steps, STEPS_PER_EPOCH)
    return replace(STATE, epoch=epoch, step=step, global_step=steps)


@pytest.mark.parametrize("eval_epochs", [1, 2, 3])
@pytest.mark.parametrize("total", [12, 10, 5])
def test_due_at_the_end_of_every_nth_epoch_and_of_the_run(eval_epochs: int, total: int) -> None:
    due = {steps for steps in range(total + 1) if is_due(after(steps), eval_epochs, total)}
    assert due == {*range(eval_epochs * STEPS_PER_EPOCH, total + 1, eval_epochs * STEPS_PER_EPOCH), total}


def test_due_once() -> None:
    state = after(STEPS_PER_EPOCH)
    assert is_due(state, 1, 12)
    done = replace(state, history=({"AP": 0.1, "step": float(state.global_step)},))
    assert not is_due(done, 1, 12)
    assert is_due(replace(after(2 * STEPS_PER_EPOCH), history=done.history), 1, 12)
