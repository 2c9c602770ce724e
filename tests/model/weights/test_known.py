"""Published weights: what they fit, and files recognised by digest or content."""

import hashlib
from pathlib import Path

import pytest
import torch
from support.helpers import tiny_checkpoint

from jobs.presets import CONFIGS
from pipeline.errors import CheckpointError
from pipeline.model.weights import known
from pipeline.model.weights.known import KNOWN, KnownFile, identify, list_weights


def test_known_files_name_presets_that_exist() -> None:
    presets = {path.stem for path in CONFIGS.glob("*.yaml")} | {"any"}
    assert {file.model.split()[0] for file in KNOWN} <= presets
    assert len({(file.name, file.where) for file in KNOWN}) == len(KNOWN)


def test_identify_recognises_a_file_by_the_digest_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "renamed.bin"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    monkeypatch.setattr(known, "KNOWN", (KnownFile(f"net-{digest}.pth", "model.init_from", "r50_detr", "there"),))
    assert identify(path).startswith(f"net-{digest}.pth, complete")


def test_identify_refuses_a_file_whose_content_is_not_that_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "resnet50-11ad3fa6.pth"
    path.write_bytes(b"half of a download")
    with pytest.raises(CheckpointError, match="resnet50-11ad3fa6"):
        identify(path)


def test_identify_without_a_digest_says_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "r50_deformable_detr-checkpoint.pth"
    torch.save(
        {"model": {"backbone.0.body.conv1.weight": torch.ones(2), "transformer.level_embed": torch.ones(2)}}, path
    )
    assert "published layout, 2 tensors" in identify(path)
    assert "own layout" in identify(tiny_checkpoint(tmp_path) / "model.safetensors")


def test_identify_of_an_own_file_with_a_date_and_of_a_checkpoint_folder_says_what_they_hold(tmp_path: Path) -> None:
    dated = tmp_path / "cells-20260131.pth"
    torch.save(
        {"model": {"transformer.level_embed": torch.ones(2), "backbone.0.body.conv1.weight": torch.ones(2)}}, dated
    )
    assert "published layout, 2 tensors" in identify(dated)
    assert "own layout" in identify(tiny_checkpoint(tmp_path))


@pytest.mark.parametrize("name", ["none.pth", ".", "x" * 300])
def test_identify_of_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError):
        identify(tmp_path / name)


def test_list_weights_shows_each_published_file_and_no_run_where_there_is_none(tmp_path: Path) -> None:
    lines = list_weights([], str(tmp_path))
    assert [line for line in lines if not line.startswith(" ")] == [file.name for file in KNOWN]
