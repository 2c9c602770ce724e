"""benchmarks.overhead: both loops train the same, and a checkpoint is measured whole."""

import argparse
from pathlib import Path

from helpers import tiny_checkpoint

from benchmarks.overhead import checkpoint_cost, settings


def test_every_step_has_one_group_of_each_rank_and_a_picture_is_drawn_for_each(tmp_path: Path) -> None:
    config = settings(tmp_path, "plain", argparse.Namespace(world=3, steps=7, zero_stage=1))
    assert config.train.global_batch == config.scaling.num_workers == 3
    assert (config.train.micro_batch, config.train.max_steps, config.scaling.cpus_per_worker) == (1, 7, 1)
    assert config.model.dropout > 0


def test_the_checkpoint_that_is_written_is_the_one_that_was_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    cost = checkpoint_cost(folder, tmp_path / "again")
    assert {file.name for file in folder.iterdir()} == {file.name for file in (tmp_path / "again").iterdir()}
    assert cost["mb"] * 1e6 == sum(file.stat().st_size for file in (tmp_path / "again").iterdir())
