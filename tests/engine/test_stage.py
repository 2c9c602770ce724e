"""`train.zero_stage: auto`: no division for small models, moments divided for large or offloaded ones."""

import pytest

from pipeline.config import TrainConfig
from pipeline.engine.stage import resolve_stage


@pytest.mark.parametrize(
    ("trainable", "offload", "stage"),
    [(40_000_000, False, 0), (499_000_000, False, 0), (501_000_000, False, 1), (40_000_000, True, 1)],
)
def test_resolve_stage_auto_follows_size_and_offload(trainable: int, offload: bool, stage: int) -> None:
    assert resolve_stage(TrainConfig(zero_stage="auto", offload_optimizer=offload), trainable) == stage


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resolve_stage_keeps_a_number(stage: int) -> None:
    assert resolve_stage(TrainConfig.model_validate({"zero_stage": stage}), 10**12) == stage
