"""Files that version 0.1 wrote keep loading: shards, run, checkpoint, registered version (`assets/version_0_1`)."""

import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from PIL import Image
from support.paths import ASSETS

from pipeline import checkpoint
from pipeline.config import changed_for_resume, dump, from_dict, from_record
from pipeline.data.index import load_index
from pipeline.data.sharding.verify import verify_shards
from pipeline.inference.predictor import Predictor
from pipeline.launch.snapshot import repair
from pipeline.registry.register import register, resolve
from pipeline.runs.record import read_run, write_run

ARCHIVE = ASSETS / "version_0_1" / "files.tar.xz"
BUILT_IN = "/tmp/old01"  # absolute paths in its records and its database begin with it
LOAD = """
import json, sys
import mlflow, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict([open(sys.argv[2], "rb").read()], params={"threshold": 0.0, "top_k": 5})))
print(sys.modules["pipeline"].__file__)
"""


@dataclass(frozen=True)
class Old:
    """The files of version 0.1, moved to `folder`, and what version 0.1 made of them."""

    folder: Path
    expected: dict[str, Any]

    @property
    def run(self) -> str:
        return str(self.folder / "runs" / "old")

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Old:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    move_database(folder)
    return Old(folder, json.loads((folder / "expected.json").read_text()))


def move_database(folder: Path) -> None:
    """MLflow's database holds absolute paths, which are nothing that this project resolves."""
    database = sqlite3.connect(folder / "mlflow.db")
    for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        for _, column, kind, *_ in database.execute(f"PRAGMA table_info({table})").fetchall():
            if kind.startswith(("VARCHAR", "TEXT")):
                change = f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE instr({column}, ?)"
                database.execute(change, (BUILT_IN, str(folder), BUILT_IN))
    database.commit()
    database.close()


def grey() -> Image.Image:
    return Image.new("RGB", (64, 64), (200, 30, 90))


def as_expected(old: Old, found: dict[str, Any]) -> None:
    for key, values in old.expected["prediction"].items():
        numbers = key in ("boxes", "scores")
        for got, expected in zip(found[key], values, strict=True):
            assert got == (pytest.approx(expected, abs=1e-3) if numbers else expected), key


@pytest.mark.parametrize("split", ["train", "val"])
def test_version_0_1_shards_verify_with_same_digest(old: Old, split: str) -> None:
    folder = str(old.folder / split)
    assert verify_shards(folder) == []
    index = load_index(folder)
    assert index.digest == old.expected[f"{split}_digest"]
    assert sum(shard.samples for shard in index.shards) == {"train": 8, "val": 4}[split]


def test_version_0_1_moved_run_finds_checkpoints(old: Old) -> None:
    record = read_run(old.run)
    state = checkpoint.load_state(record.checkpoint)
    assert Path(record.checkpoint).parent == Path(old.run)
    assert (state.epoch, state.step, state.global_step) == (2, 0, 4)
    config = from_record(record.config, "run.json")
    assert "published" in record.config  # a section that is none any more
    assert changed_for_resume(config, from_dict(dump(config))) == {}
    assert config.model.hidden_dim == 16
    assert not config.model.norm_valid
    assert config.evaluation.micro_batch == config.train.micro_batch == 2  # as its AP was computed


def test_version_0_1_run_can_be_resumed(old: Old) -> None:
    (stored,) = repair(old.run)
    assert stored.state.global_step == 4


def test_version_0_1_ap_stays_after_resume(old: Old, tmp_path: Path) -> None:
    folder = shutil.copytree(old.run, tmp_path / "old")
    (folder / "evaluations.json").unlink(missing_ok=True)  # another test may have resumed it
    before = read_run(str(folder))
    assert before.metrics["val/AP"] >= 0
    repair(str(folder))
    write_run(replace(before, best=None, metrics={}))
    after = read_run(str(folder))
    assert after.best == before.best
    assert {key: value for key, value in before.metrics.items() if key.startswith("val/")} == after.metrics


def test_version_0_1_checkpoint_predicts_the_same(old: Old) -> None:
    inference = checkpoint.load_inference(read_run(old.run).checkpoint)
    (found,) = Predictor(inference).predict([grey()], 0.0, 5)
    as_expected(old, dict(found))


def test_version_0_1_registered_version_is_found(old: Old) -> None:
    with resolve("models:/old@champion", old.tracking_uri) as folder:
        inference = checkpoint.load_inference(folder)
    (found,) = Predictor(inference).predict([grey()], 0.0, 5)
    as_expected(old, dict(found))
    assert register(read_run(old.run), "old", "champion", old.tracking_uri) == "1"


def test_version_0_1_registered_version_runs_in_mlflow(old: Old) -> None:
    image = old.folder / "grey.png"
    grey().save(image)
    client = mlflow.MlflowClient(old.tracking_uri, old.tracking_uri)
    model = client.get_model_version_download_uri("old", "1")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, model, str(image)],
        cwd=old.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, package = done.stdout.splitlines()[-2:]
    as_expected(old, json.loads(found)[0])
    assert Path(package).is_relative_to(old.folder)
