"""What is done and what is next, for whatever a kill has left."""

import itertools
from dataclasses import replace

import pytest

from pipeline.launch.finetune.stages import AFTER_TRAINING, Facts, Stage, next_stage


def advance(facts: Facts, stage: Stage) -> Facts:
    """What is on disk after a stage."""
    if stage is Stage.LINT:
        return replace(facts, accepted=True)
    if stage is Stage.SHARDS:
        return replace(facts, shards=True)
    if stage is Stage.TRAINING:
        return replace(facts, trained=True, best="new")
    return replace(facts, done=tuple((dict(facts.done) | {stage: facts.best}).items()))


def stages_from(facts: Facts) -> list[Stage]:
    found = []
    while (stage := next_stage(facts)) is not None:
        found.append(stage)
        facts = advance(facts, stage)
        assert len(found) <= len(Stage)
    return found


def test_stages_of_a_new_start_come_in_their_order() -> None:
    assert stages_from(Facts()) == list(Stage)
    assert stages_from(Facts(has_test=False)) == [stage for stage in Stage if stage is not Stage.TEST]


@pytest.mark.parametrize("killed", range(len(Stage) + 1))
def test_stages_after_a_kill_repeat_none_that_was_done(killed: int) -> None:
    facts = Facts()
    for stage in list(Stage)[:killed]:
        facts = advance(facts, stage)
    assert stages_from(facts) == list(Stage)[killed:]


def test_stages_after_another_best_checkpoint_are_all_done_again() -> None:
    for count in range(len(AFTER_TRAINING) + 1):
        for done in itertools.combinations(AFTER_TRAINING, count):
            facts = Facts(True, True, True, "old", tuple((stage, "old") for stage in done))
            assert stages_from(facts) == [stage for stage in AFTER_TRAINING if stage not in done]
            assert stages_from(replace(facts, best="new")) == list(AFTER_TRAINING)


def test_stages_with_other_settings_train_first() -> None:
    done = tuple((stage, "old") for stage in AFTER_TRAINING)
    assert stages_from(Facts(True, True, False, "old", done))[0] is Stage.TRAINING
