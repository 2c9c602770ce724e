"""`train.zero_stage: auto`: no division for small models, moments divided for large or offloaded ones."""

from typing import Any

import pytest

from pipeline.config import TrainConfig
from pipeline.engine.stage import resolve_stage, stage_warning


@pytest.mark.parametrize(
    ("trainable", "offload", "stage"),
    [(40_000_000, False, 0), (499_000_000, False, 0), (501_000_000, False, 1), (40_000_000, True, 1)],
)
def test_resolve_stage_auto_follows_size_and_offload(trainable: int, offload: bool, stage: int) -> None:
    assert resolve_stage(TrainConfig(zero_stage="auto", offload_optimizer=offload), trainable) == stage


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resolve_stage_keeps_a_number(stage: int) -> None:
    assert resolve_stage(TrainConfig.model_validate({"zero_stage": stage}), 10**12) == stage


@pytest.mark.parametrize(
    ("settings", "trainable", "named"),
    [
        ({"delay_results": True}, 600_000_000, ["train.delay_results"]),
        ({"channels_last": True}, 600_000_000, ["train.channels_last"]),
        ({"delay_results": True, "channels_last": True}, 600_000_000, ["train.delay_results", "train.channels_last"]),
        ({"channels_last": True, "offload_optimizer": True}, 40_000_000, ["train.channels_last", "offloaded"]),
        ({"delay_results": True, "channels_last": True}, 40_000_000, []),
        ({}, 600_000_000, []),
    ],
    ids=str,
)
def test_stage_warning_names_the_settings_that_do_nothing(
    settings: dict[str, Any], trainable: int, named: list[str]
) -> None:
    warning = stage_warning(TrainConfig.model_validate({"zero_stage": "auto", **settings}), trainable)
    assert all(name in warning for name in named)
    assert warning.count("train.delay_results") == int("train.delay_results" in named)
    assert bool(warning) == bool(named)
