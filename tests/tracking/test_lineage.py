"""MLflow's entries of a run besides its numbers: data sets, source, user."""

import getpass
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.data import write_shards
from support.helpers import tiny_config

from pipeline.data.index import ShardIndex
from pipeline.tracking.client import connect
from pipeline.tracking.lineage import source_tags
from pipeline.tracking.run import start_run


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_shards(tmp_path)


def test_run_lists_both_shard_folders_as_data_sets(index: ShardIndex, tmp_path: Path) -> None:
    config = tiny_config(tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    run_id = start_run(config.tracking, config, "run", data={"train": index, "val": index})
    run = connect(config.tracking.uri).get_run(run_id)
    found = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    assert set(found) == {"training", "validation"}
    for dataset in found.values():
        assert index.digest.startswith(dataset.digest)
        assert json.loads(dataset.source) == {"uri": index.folder}
        profile = json.loads(dataset.profile)
        assert profile["digest"] == index.digest
        assert (profile["images"], profile["categories"]) == (len(index), len(index.categories))
        assert profile["boxes"] == int(index.samples.boxes.sum())
    assert run.data.tags["mlflow.user"] == getpass.getuser()


@pytest.mark.parametrize("git", [True, False])
def test_source_is_the_commit_where_there_is_one(git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main.py").touch()
    monkeypatch.setattr("sys.argv", [str(tmp_path / "main.py")])
    monkeypatch.setattr("mlflow.tracking.context.git_context.GitRunContext._git_info", property(_git_info))
    commit = None
    if git:
        run = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@there"]
        for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"],
                          ["remote", "add", "origin", "https://hunter2@host/x.git"]):  # fmt: skip
            subprocess.run([*run, *arguments], check=True)
        commit = subprocess.run([*run, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    tags = source_tags()
    assert tags.get("mlflow.source.git.commit") == commit
    assert tags["mlflow.source.name"] == str(tmp_path / "main.py")
    assert "hunter2" not in str(tags)


def _git_info(_: Any) -> dict[str, str | None]:
    """As MLflow finds it, without what it remembers of this process."""
    from mlflow.tracking.context.git_context import _resolve_git_info

    return _resolve_git_info()
