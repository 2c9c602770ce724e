"""Which checkpoint a worker group starts from."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.state import STATE_OF_TEST

from pipeline import checkpoint
from pipeline.checkpoint import OPTIMIZER, STATE, WEIGHTS
from pipeline.errors import CheckpointError
from pipeline.training.restoring import newest_complete


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three checkpoints, newest first."""
    made = []
    for step in (30, 20, 10):
        tensors = {"weight": torch.full((4,), float(step))}
        checkpoint.save(tmp_path / str(step), replace(STATE_OF_TEST, global_step=step), tensors, tensors)
        made.append(tmp_path / str(step))
    return made


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_newest_complete_damaged_ones_are_skipped_with_a_warning(
    folders: list[Path], count: int, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in folders[:count]:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1  # the size stays
        (folder / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        chosen, loaded = newest_complete(folders, checkpoint.load)
    assert chosen == folders[count]
    assert loaded.state.global_step == int(chosen.name)
    for folder in folders[:count]:
        assert f"skipped: checkpoint file {folder}" in caplog.text or f"skipped: {folder}" in caplog.text
    assert len(caplog.records) == count


def test_newest_complete_without_complete_one_raises(folders: list[Path]) -> None:
    for folder in folders:
        (folder / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"30 .*20 .*10"):
        newest_complete(folders, checkpoint.load)


def test_newest_complete_other_model_counts_as_complete(folders: list[Path]) -> None:
    """Loading its weights raises an error later; here only completeness counts."""
    assert newest_complete(folders, checkpoint.load)[0] == folders[0]
