"""The stages of a fine-tuning, and which one is next. Pure; never fails.

A stage is done if its output is there and belongs to what came before: an evaluation is that of the checkpoint that is
best now. So a start after a kill at any moment repeats at most the stage that was running.
"""

from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """In their order; the value is what the terminal says."""

    LINT = "check the data set"
    SHARDS = "build the shards"
    TRAINING = "train"
    TEST = "evaluate on test"
    REGISTRATION = "register"
    DRAWINGS = "draw detections"
    REPORT = "write the report"


AFTER_TRAINING = (Stage.TEST, Stage.REGISTRATION, Stage.DRAWINGS, Stage.REPORT)


@dataclass(frozen=True)
class Facts:
    """What is on disk."""

    accepted: bool = False  # the data set was checked and the settings chosen
    shards: bool = False  # every split has its index
    trained: bool = False  # the run is finished, with the settings of this start
    best: str = ""  # its best checkpoint
    done: tuple[tuple[Stage, str], ...] = ()  # of AFTER_TRAINING, and for which checkpoint
    has_test: bool = True


def next_stage(facts: Facts) -> Stage | None:
    """The first stage that is not done; None if all are."""
    if not facts.accepted:
        return Stage.LINT
    if not facts.shards:
        return Stage.SHARDS
    if not facts.trained or not facts.best:
        return Stage.TRAINING
    wanted = [stage for stage in AFTER_TRAINING if facts.has_test or stage is not Stage.TEST]
    return next((stage for stage in wanted if dict(facts.done).get(stage) != facts.best), None)
