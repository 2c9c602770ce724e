"""checkpoint_folder: what names a model on the command line leads to the same weights."""

from pathlib import Path

import pytest
from helpers import tiny_checkpoint, tiny_config, tiny_run

from pipeline.errors import RunError
from pipeline.locate import checkpoint_folder
from pipeline.mlflow_client import connect
from pipeline.registry import register
from pipeline.runs import RunRecord, write_run

NOWHERE = "sqlite:///never/opened.db"


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    """runs/tiny in the current folder, with a store beside it."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tracking={"uri": f"sqlite:///{tmp_path}/runs/mlflow.db", "register_as": "found"})
    connect(config.tracking.uri, create=True)
    record = tiny_run(tmp_path / "runs" / "tiny", config)
    write_run(record)
    return record


def test_a_run_by_folder_file_or_name(record: RunRecord) -> None:
    names = ("tiny", "runs/tiny", record.folder, f"{record.folder}/run.json")
    assert {checkpoint_folder(name, NOWHERE) for name in names} == {Path(record.checkpoint)}


def test_a_checkpoint_folder_is_itself(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    assert checkpoint_folder(str(folder), NOWHERE) == Path(folder)


def test_a_registered_version(record: RunRecord) -> None:
    register(record, "found", "champion")
    found = checkpoint_folder("models:/found@champion", record.config["tracking"]["uri"])
    weights = "model.safetensors"
    assert (found / weights).read_bytes() == (Path(record.checkpoint) / weights).read_bytes()


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="there is no run 'absent'"):
        checkpoint_folder("absent", NOWHERE)
