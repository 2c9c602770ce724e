"""A run of two workers that is stopped and resumed, and its end compared with that of another."""

import torch

from pipeline import checkpoint
from pipeline.config import Config
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.record import RunRecord
from support.workspace import Workspace

STEPS = 16  # of six per epoch, each of two pad groups per worker


def config_of(workspace: Workspace, name: str, **changes: object) -> Config:
    """Two workers, 16 steps in three epochs, a checkpoint every 3 steps; size grouping, dropout and average are on."""
    settings = {
        "global_batch": 8,
        "epochs": 3,
        "max_steps": STEPS,
        "checkpoint_steps": 3,
        "keep_checkpoints": 3,
        "ema_decay": 0.9,
        "checkpoint_upload": "async",
    }
    return workspace.config(name, **{f"train__{key}": value for key, value in (settings | changes).items()})


def assert_same_end(one: RunRecord, other: RunRecord) -> None:
    a, b = checkpoint.load(one.last or ""), checkpoint.load(other.last or "")
    assert a.state.global_step == b.state.global_step == STEPS
    assert [row.entry for row in read_evaluations(one.folder)] == [row.entry for row in read_evaluations(other.folder)]
    assert a.average is not None
    assert b.average is not None
    for mine, theirs in ((a.weights, b.weights), (a.moments, b.moments), (a.average, b.average)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name
