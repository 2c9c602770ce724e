"""Runs that end by their own settings: after the time, and when the AP no longer rises, killed or not."""

from pathlib import Path

import pytest
from support.workspace import Workspace

from pipeline import checkpoint
from pipeline.launch.driver import train
from pipeline.runs.evaluations import read_evaluations
from pipeline.training.ending import FILE

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_two_cpus")]
STILL = {"optim__lr": 1e-30, "optim__backbone_lr": 0.0, "train__eval_epochs": 1}  # the AP never changes


def steps_of(folder: str) -> list[int]:
    return [int(row.entry["step"]) for row in read_evaluations(folder)]


@pytest.mark.slow
def test_run_whose_time_is_up_ends_at_a_step_with_checkpoint_and_evaluation(workspace: Workspace) -> None:
    config = workspace.config("short", train__max_minutes=1e-4, scaling__num_workers=1)
    record = train(config)
    assert (record.status, record.stopped) == ("FINISHED", "")
    assert checkpoint.load_state(record.checkpoint).global_step == 1
    assert steps_of(record.folder) == [1]
    assert (Path(record.folder) / FILE).is_file()


@pytest.mark.slow
def test_run_without_a_higher_ap_ends_and_continues_only_with_more_patience(workspace: Workspace) -> None:
    settings = {**STILL, "train__epochs": 6, "train__patience": 2}
    record = train(workspace.config("still", **settings))
    assert record.status == "FINISHED"
    assert steps_of(record.folder) == [6, 12, 18]
    again = train(workspace.config("still", **settings), resume="must")
    assert (again.status, steps_of(again.folder), again.last) == ("FINISHED", [6, 12, 18], record.last)
    more = train(workspace.config("still", **{**settings, "train__patience": 3}), resume="must")
    assert (more.status, steps_of(more.folder)) == ("FINISHED", [6, 12, 18, 24])


@pytest.mark.slow
def test_time_counts_over_all_starts(workspace: Workspace) -> None:
    config = workspace.config("again", train__max_minutes=1e-4, scaling__num_workers=1)
    first = train(config)
    second = train(config, resume="must")
    assert (second.last, steps_of(second.folder)) == (first.last, steps_of(first.folder))
    longer = train(workspace.config("again", train__max_minutes=60, scaling__num_workers=1), resume="must")
    assert longer.status == "FINISHED"
    assert steps_of(longer.folder)[-1] == 12
