"""The warning about a schedule that does not fit the run, and that no preset gets it."""

from pathlib import Path

import pytest
from support.paths import ROOT

from pipeline.config import OptimConfig, load_config
from pipeline.engine.optim import lr_factor
from pipeline.engine.schedule import schedule_warning

PRESETS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
LONG = 10**6  # steps


@pytest.mark.parametrize("epochs", [1, 2, 10, 40, 41, 50])
@pytest.mark.parametrize("drops", [(), (1,), (40,), (8, 60)])
def test_schedule_warning_names_exactly_the_drops_that_lower_no_rate(epochs: int, drops: tuple[int, ...]) -> None:
    optim = OptimConfig(drop_epochs=drops)
    warning = schedule_warning(optim, epochs, LONG)
    lowest = min(lr_factor(optim, epoch, epoch, epochs) for epoch in range(epochs))
    reached = sum(drop < epochs for drop in drops)
    assert lowest == pytest.approx(optim.drop_factor**reached)
    assert (f"after epoch {', '.join(map(str, drops[reached:]))} " in warning) == (reached < len(drops))
    assert bool(warning) == (reached < len(drops))


@pytest.mark.parametrize(("epochs", "advice"), [(1, "[]"), (2, "[1]"), (10, "[8]"), (12, "[10]"), (50, "[40]")])
def test_schedule_warning_gives_drops_that_the_run_reaches(epochs: int, advice: str) -> None:
    assert f"optim.drop_epochs={advice}, " in schedule_warning(OptimConfig(drop_epochs=(70,)), epochs, LONG)


@pytest.mark.parametrize(
    "settings", [{"schedule": "cosine"}, {"drop_factor": 1.0}, {"drop_epochs": ()}, {"warmup_steps": 14}]
)
def test_schedule_warning_is_silent_where_the_drops_are_not_read_or_change_nothing(settings: dict[str, object]) -> None:
    optim = OptimConfig.model_validate({"drop_epochs": (40,), **settings})
    assert schedule_warning(optim, 50 if "warmup_steps" in settings else 10, 14) == ""


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_schedule_warning_of_a_warm_up_that_does_not_end(schedule: str) -> None:
    optim = OptimConfig.model_validate({"schedule": schedule, "warmup_steps": 15})
    assert max(lr_factor(optim, 0, step, 14) for step in range(14)) < 1
    assert "optim.warmup_steps=15" in schedule_warning(optim, 50, 14)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_no_preset_has_a_schedule_that_does_not_fit(preset: Path) -> None:
    config = load_config(preset)
    assert schedule_warning(config.optim, config.train.epochs, LONG) == ""
