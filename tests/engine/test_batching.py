"""The batch arithmetic over worlds and batches, and the warning about a batch that is not the recipe's."""

import pytest
from support.paths import ROOT

from pipeline.config import PublishedConfig, TrainConfig, load_config
from pipeline.data.plan import assign
from pipeline.engine.batching import batch_arithmetic, recipe_warning

CONFIGS = ROOT / "jobs" / "configs"


@pytest.mark.parametrize("world", range(1, 10))
@pytest.mark.parametrize(("global_batch", "micro_batch"), [(2, 2), (6, 2), (10, 2), (32, 2), (32, 4), (64, 1)])
def test_every_group_runs_once_with_weight_one(world: int, global_batch: int, micro_batch: int) -> None:
    """What the arithmetic says is what the plan hands out."""
    batch = batch_arithmetic(TrainConfig(global_batch=global_batch, micro_batch=micro_batch), world)
    shares = [assign(batch.groups, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {batch.passes}
    assert sum(part.weight == 0 for share in shares for part in share) == batch.idle < world
    assert sorted(part.group for share in shares for part in share if part.weight) == list(range(batch.groups))
    assert batch.groups * micro_batch == global_batch


def test_it_says_how_much_of_the_work_is_idle() -> None:
    train = TrainConfig(global_batch=32, micro_batch=2)
    assert str(batch_arithmetic(train, 4)) == "32 images = 16 pad groups of 2; 4 ranks x 4 groups each"
    assert str(batch_arithmetic(train, 5)).endswith(
        "5 ranks x 4 groups each, 4 of them with weight 0 (20% of the work)"
    )


@pytest.mark.parametrize(("batch", "factor"), [(8, "0.5"), (16, "0.71"), (128, "2")])
def test_another_batch_than_the_recipe_gets_the_recipe(batch: int, factor: str) -> None:
    warning = recipe_warning(TrainConfig(global_batch=batch), PublishedConfig(global_batch=32))
    assert f"train.global_batch is {batch}" in warning
    assert "for 32" in warning
    assert f"times {factor}, the square root" in warning
    assert ("warmup_steps" in warning) == (batch > 32)


def test_the_recipe_and_a_preset_without_one_get_no_warning() -> None:
    assert recipe_warning(TrainConfig(global_batch=32), PublishedConfig(global_batch=32)) == ""
    assert recipe_warning(TrainConfig(global_batch=3, micro_batch=1), PublishedConfig()) == ""


@pytest.mark.parametrize("preset", sorted(path.stem for path in CONFIGS.glob("*_de*.yaml")))
def test_presets_are_at_the_batch_of_their_recipe(preset: str) -> None:
    config = load_config(CONFIGS / f"{preset}.yaml")
    assert config.published.global_batch == config.train.global_batch
    assert recipe_warning(config.train, config.published) == ""
