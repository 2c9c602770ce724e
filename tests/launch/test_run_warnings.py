"""The warnings about a run: the dry run and the run say the same."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import Config, override
from pipeline.data.index import load_index
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.errors import ResourceError
from pipeline.launch import driver
from pipeline.launch.preflight import check_run
from pipeline.launch.preview import preview
from pipeline.launch.run_warnings import box_warning, run_warnings


@pytest.fixture(scope="module")
def config_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Makes the config of a run over 3 steps per epoch that gives no warning, with these changes."""
    folder = tmp_path_factory.mktemp("warnings")
    for seed, split in enumerate(("train", "val")):
        annotations, images = write_synthetic(folder / "raw" / split, images=12, seed=seed, size=64)
        build_shards(annotations, images, folder / split)
    usual = Config.model_validate(
        {
            "storage": str(folder / "runs"),
            "data": {"train": str(folder / "train"), "val": str(folder / "val")},
            "model": {"num_classes": 5, "backbone": {"weights": "none"}},
            "train": {"global_batch": 4},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        }
    )
    return lambda *words: override(usual, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.epochs=10"], "optim.drop_epochs"),
        (["optim.warmup_steps=151"], "optim.warmup_steps"),
        (["optim.warmup_steps=5", "train.max_steps=4"], "optim.warmup_steps"),
        (["train.zero_stage=auto", "train.offload_optimizer=true", "train.channels_last=true"], "train.channels_last"),
    ],
)
def test_run_warnings_are_said_by_the_dry_run_and_by_the_run(
    config_with: Callable[..., Config],
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_with(*words)
    (warning,) = run_warnings(check_run(config))
    assert said in warning
    assert f"\nwarning     {warning}" in preview(config)

    def no_ray() -> None:
        raise ResourceError("no Ray in this test")

    monkeypatch.setattr(driver, "start_ray", no_ray)
    with caplog.at_level(logging.WARNING, "pipeline"), pytest.raises(ResourceError, match="no Ray"):
        driver.train(config)
    assert warning in [record.getMessage() for record in caplog.records]


def test_run_warnings_of_the_same_images_and_of_another_batch(config_with: Callable[..., Config]) -> None:
    same = config_with()
    same = same.model_copy(update={"data": same.data.model_copy(update={"val": same.data.train})})
    assert [warning.split()[0] for warning in run_warnings(check_run(same))] == ["data.train"]
    assert run_warnings(check_run(config_with("train.epochs=50"))) == []


def test_box_warning_names_the_splits_without_a_box(config_with: Callable[..., Config]) -> None:
    full = load_index(config_with().data.train)
    empty = replace(full, samples=replace(full.samples, boxes=np.zeros_like(full.samples.boxes)))
    assert box_warning(full, full) == ""
    assert "data.train" in box_warning(empty, full)
    assert "data.val" not in box_warning(empty, full)
    assert "data.val has no box" in box_warning(full, empty)
    assert "data.train" not in box_warning(full, empty)


def test_run_warnings_say_that_the_training_images_have_no_box(config_with: Callable[..., Config]) -> None:
    checked = check_run(config_with("train.epochs=50"))
    samples = replace(checked.train.samples, boxes=np.zeros_like(checked.train.samples.boxes))
    (warning,) = run_warnings(replace(checked, train=replace(checked.train, samples=samples)))
    assert "data.train has no box" in warning
