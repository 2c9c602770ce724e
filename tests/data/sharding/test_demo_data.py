"""The demo's data are drawn once, and who lacks them reads the command."""

from pathlib import Path

import pytest
from support.paths import ROOT

from jobs.cli import main
from jobs.demo import build_parser, run
from pipeline.config import load_config
from pipeline.data.index import DEMO_FOLDERS, load_index
from pipeline.data.sharding import demo_data
from pipeline.errors import ShardError


def test_demo_data_alone_are_drawn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_data, "IMAGES", {"train": 3, "val": 2})
    for folder in DEMO_FOLDERS:
        with pytest.raises(ShardError, match=r"jobs\.demo --data"):
            load_index(folder)
    assert main(build_parser(), run, ["--data"]) == 0
    assert [len(load_index(folder).samples) for folder in DEMO_FOLDERS] == [3, 2]
    assert f"drawn: {DEMO_FOLDERS[0]}, {DEMO_FOLDERS[1]}" in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(build_parser(), run, ["--data"]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    assert not (tmp_path / "runs/mlflow.db").exists()


def test_demo_folders_are_those_of_the_demos_config() -> None:
    data = load_config(ROOT / "jobs/configs/demo.yaml").data
    assert (data.train, data.val) == DEMO_FOLDERS
