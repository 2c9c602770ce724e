"""A sweep as text: the plan before it, and the table after it."""

from typing import Any

import pytest
import yaml
from support.sweeps import make_space

from tune.results.listing import describe_plan, list_outcomes
from tune.results.outcomes import Outcome

AXES = {
    "optim.lr": {"loguniform": (1e-4, 1e-3)},
    "optim.drop_epochs": {"choice": ([1], [2])},
    "model.enc_points, model.dec_points": {"grid": (2, 4)},
}


def outcome(name: str, score: float | None, points: int = 2, **changes: Any) -> Outcome:
    values = {"optim.lr": 2e-4, "optim.drop_epochs": [2], "model.enc_points, model.dec_points": points}
    return Outcome(**{"name": name, "values": values, "status": "finished", "epochs": 3, "score": score, **changes})


def test_table_ranks_trials_and_keeps_errors() -> None:
    space = make_space({}, AXES, epochs=3)
    failed = outcome("c", None, status="failed", epochs=0, error="no CUDA device")
    lines = list_outcomes(space, [outcome("a", 0.1), failed, outcome("b", 0.2, points=4)]).splitlines()
    assert [line.split()[0] for line in lines] == ["trial", "b", "a", "c", "c:"]
    assert lines[1].split() == ["b", "0.0002", "[2]", "4", "3", "0.2000", "finished"]
    assert "no CUDA device" in lines[-1]


def test_table_calls_an_interrupted_trial_unfinished_because_its_sweep_may_be_running() -> None:
    lines = list_outcomes(make_space({}, AXES), [outcome("a", 0.1, status="interrupted")]).splitlines()
    assert lines[1].split()[-1] == "unfinished"


def test_plan_shows_config_trials_and_axes() -> None:
    space = make_space({}, AXES, epochs=3)
    text = describe_plan(space)
    assert "16 trials of up to 3 epochs by random on val/AP; asha: after 1 epochs 1 in 3 continues" in text
    assert yaml.safe_load(text.split("\n\n")[0])["name"] == "sweep"
    assert "loguniform  [0.0001, 0.001]" in text


@pytest.mark.parametrize(
    ("search", "text"),
    [
        ({"sampler": "tpe", "scheduler": "median"}, "8 trials of up to 4 epochs by tpe on val/AP; after 1 epochs"),
        ({"repeats": 3, "samples": 2}, "6 trials of up to 4 epochs by random on val/AP, 3 seeds each"),
        ({"epochs": 40, "minutes": 90, "scheduler": "none"}, "within 40 epochs of training, started within 90 minutes"),
    ],
)
def test_plan_shows_search(search: dict[str, Any], text: str) -> None:
    assert text in describe_plan(make_space(search))
