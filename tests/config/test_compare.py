"""What a resumed run must keep and what makes two runs the same recipe; the lists name settings that exist."""

import pytest

from pipeline.config import Config, changed_for_resume, flatten, from_dict, override, recipe_settings
from pipeline.config.compare import NEUTRAL, RECIPE, RESUME, START


@pytest.mark.parametrize("entry", [*NEUTRAL, *START, *RESUME, *RECIPE])
def test_every_entry_stands_for_settings(entry: str) -> None:
    keys = [key for key in flatten(Config()) if key.startswith(entry)]
    assert keys if entry.endswith(".") else keys == [entry]


@pytest.mark.parametrize("key", [*NEUTRAL, *START])
def test_an_exception_is_one(key: str) -> None:
    assert key.startswith((*RESUME, *RECIPE))


@pytest.mark.parametrize(
    "change",
    [
        "model.op=torch",
        "model.checkpoint_encoder=true",
        "model.merge_layers=true",
        "train.fold_norms=true",
        "model.init_from=weights.pth",
        "model.backbone.weights=none",
        "train.compile=true",
        "train.ema_decay=0.9",
        "train.epochs=3",
        "scaling.num_workers=4",
        "optim.lr=1e-3",
    ],
)
def test_a_run_may_go_on_with_another(change: str) -> None:
    assert changed_for_resume(Config(), override(Config(), [change])) == {}


@pytest.mark.parametrize(
    ("change", "old"),
    [
        ("seed=1", 42),
        ("model.queries=11", 300),
        ("model.backbone.norm=group", "frozen_batch"),
        ("train.micro_batch=4", 2),
        ("data.pad_multiple=64", 1),
        ("data.augment.flip=0.0", 0.5),
        ("data.augment.preset=small", "published"),
        ("data.augment.mosaic=0.5", None),
        ("data.balance=0.1", 0.0),
    ],
)
def test_a_run_may_not_go_on_with_another(change: str, old: object) -> None:
    key = change.partition("=")[0]
    now = override(Config(), [change])
    assert changed_for_resume(Config(), now) == {key: (old, flatten(now)[key])}


def test_a_recipe_has_no_name_and_no_place() -> None:
    named = from_dict({"name": "other", "seed": 1, "storage": "elsewhere", "scaling": {"num_workers": 8},
                       "train": {"precision": "bf16", "compile": True}, "model": {"op": "torch"},
                       "evaluation": {"where": "tasks"}})  # fmt: skip
    assert recipe_settings(named) == recipe_settings(Config())
    assert recipe_settings(override(Config(), ["train.epochs=12"])) != recipe_settings(Config())
    assert recipe_settings(override(Config(), ["model.init_from=weights.pth"])) != recipe_settings(Config())
    for change in (
        "train.patience=3",
        "train.max_minutes=60",
        "data.balance=0.1",
        "data.augment.preset=strong",
        "data.augment.blur=0.1",
    ):
        assert recipe_settings(override(Config(), [change])) != recipe_settings(Config())
