"""The batch arithmetic over worlds and batches, and the warning about a batch that is not the recipe's."""

import pytest
from support.paths import ROOT

from pipeline.config import Config, TrainConfig, load_config, override
from pipeline.data.plan import assign_groups
from pipeline.engine.batching import RECIPES, batch_arithmetic, recipe_warning
from pipeline.presets.published import find_published

CONFIGS = ROOT / "jobs" / "configs"


@pytest.mark.parametrize("world", range(1, 10))
@pytest.mark.parametrize(("global_batch", "micro_batch"), [(2, 2), (6, 2), (10, 2), (32, 2), (32, 4), (64, 1)])
def test_batch_arithmetic_every_group_runs_once(world: int, global_batch: int, micro_batch: int) -> None:
    """What the arithmetic says is what the plan hands out."""
    batch = batch_arithmetic(TrainConfig(global_batch=global_batch, micro_batch=micro_batch), world)
    shares = [assign_groups(batch.groups, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {batch.passes}
    assert sum(part.weight == 0 for share in shares for part in share) == batch.idle < world
    assert sorted(part.group for share in shares for part in share if part.weight) == list(range(batch.groups))
    assert batch.groups * micro_batch == global_batch


def test_batch_arithmetic_text_names_the_idle_share() -> None:
    train = TrainConfig(global_batch=32, micro_batch=2)
    assert str(batch_arithmetic(train, 4)) == "32 images = 16 pad groups of 2; 4 ranks x 4 groups each"
    assert str(batch_arithmetic(train, 5)).endswith(
        "5 ranks x 4 groups each, 4 of them with weight 0 (20% of the work)"
    )


def warning_of(config: Config) -> str:
    return recipe_warning(config.model, config.optim, config.train)


@pytest.mark.parametrize(("preset", "recipe"), [("r50_deformable_refine", 32), ("r50_detr", 64)])
@pytest.mark.parametrize(("ratio", "factor"), [(0.25, "0.5"), (0.5, "0.71"), (4, "2")])
def test_recipe_warning_at_another_batch_gives_the_factor(preset: str, recipe: int, ratio: float, factor: str) -> None:
    batch = int(recipe * ratio)
    warning = warning_of(load_config(CONFIGS / f"{preset}.yaml", [f"train.global_batch={batch}"]))
    assert f"train.global_batch is {batch}" in warning
    assert f"for {recipe}" in warning
    assert f"times {factor}, the square root" in warning
    assert ("warmup_steps" in warning) == (ratio > 1)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.global_batch=32"],
        ["train.global_batch=64", "optim.lr=3e-4"],  # the advice was taken
        ["train.global_batch=8", "model.backbone.weights=none"],  # no published model
        ["train.global_batch=8", "model.name=faster_rcnn", "loss.classification=own"],
    ],
)
def test_recipe_warning_is_silent_without_the_published_recipe(settings: list[str]) -> None:
    assert warning_of(override(Config(), settings)) == ""


@pytest.mark.parametrize("preset", sorted(path.stem for path in CONFIGS.glob("r*_de*.yaml")))
def test_recipes_are_those_of_the_presets(preset: str) -> None:
    config = load_config(CONFIGS / f"{preset}.yaml")
    rates = config.model.name, config.optim.lr, config.optim.backbone_lr
    assert RECIPES[rates] == config.train.global_batch == find_published(preset.removesuffix("_gpu")).global_batch
    assert warning_of(config) == ""
