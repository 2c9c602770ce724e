"""checkpoint_folder: what names a model on the command line leads to the same weights."""

import tempfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from support.helpers import tiny_checkpoint, tiny_config, tiny_run

from pipeline.checkpoint import load_inference
from pipeline.errors import RunError
from pipeline.registry.locate import checkpoint_folder
from pipeline.registry.register import register
from pipeline.runs.record import RunRecord, write_run
from pipeline.tracking.client import connect

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


def test_checkpoint_folder_of_run_by_folder_file_or_name(record: RunRecord) -> None:
    names = ("tiny", "runs/tiny", record.folder, f"{record.folder}/run.json")
    for name in names:
        with checkpoint_folder(name, NOWHERE) as folder:
            assert folder == Path(record.checkpoint)
    assert folder.exists()


def test_checkpoint_folder_of_a_checkpoint_is_itself(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    with checkpoint_folder(str(folder), NOWHERE) as found:
        assert found == Path(folder)
    assert folder.exists()


def test_checkpoint_folder_of_registered_version(record: RunRecord) -> None:
    register(record, "found", "champion")
    weights = "model.safetensors"
    with checkpoint_folder("models:/found@champion", record.config["tracking"]["uri"]) as found:
        assert (found / weights).read_bytes() == (Path(record.checkpoint) / weights).read_bytes()
    assert found.exists(), "the store is on this machine, so nothing was copied"


def test_checkpoint_folder_of_bucket_is_a_temporary_copy(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = Path("temporary").absolute()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    bucket = f"memory://locate-{temporary.parent.name}/tiny"
    fsspec.filesystem("memory").put(record.checkpoint, f"{bucket}/checkpoint", recursive=True)
    write_run(replace(record, folder=bucket, last=f"{bucket}/checkpoint"))
    with checkpoint_folder(bucket, NOWHERE) as folder:
        assert folder.is_relative_to(temporary)
        assert load_inference(folder).state == load_inference(record.checkpoint).state
    with pytest.raises(KeyError), checkpoint_folder(bucket, NOWHERE):
        raise KeyError
    assert list(temporary.iterdir()) == []


def test_checkpoint_folder_unknown_name_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="'absent'"), checkpoint_folder("absent", NOWHERE):
        raise AssertionError("there is no such run")
