"""One worker on each of several nodes, with shards and checkpoints in a bucket; and refused requests."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import mlflow
import pytest
import ray
from ray.cluster_utils import Cluster
from support.cluster import several_nodes
from support.metrics import losses
from support.s3 import s3_store
from support.workspace import Workspace

from pipeline import checkpoint
from pipeline.config import Config
from pipeline.errors import ResourceError, RunError
from pipeline.files import storage
from pipeline.launch.driver import train
from pipeline.launch.snapshot import repair
from pipeline.registry.locate import checkpoint_folder
from pipeline.runs.record import RunRecord, run_exists

pytestmark = pytest.mark.ray
STEPS = 6


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_store() as url:
        yield url


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where torch and DeepSpeed would build on these nodes."""
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(scope="module")
def cluster(bucket: str, extensions: Path) -> Iterator[Cluster]:
    """Last, because its nodes inherit from this process where bucket and extensions are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        with several_nodes() as made:
            yield made


def config_of(workspace: Workspace, name: str, **changes: object) -> Config:
    settings = {"train__max_steps": STEPS, "train__checkpoint_steps": 2, "train__eval_epochs": 9}
    return workspace.config(name, **{"scaling__num_workers": 2, **settings, **changes})


@pytest.fixture(scope="module")
def whole(workspace: Workspace, cluster: Cluster) -> RunRecord:
    """All files by path, never stopped."""
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    assert sorted(cpus) == [0, 1, 1]  # two workers of one CPU: each is alone on its node
    return train(config_of(workspace, "on_one_node"))


@pytest.fixture(scope="module")
def resumed(workspace: Workspace, cluster: Cluster, bucket: str) -> RunRecord:
    """All files in the bucket; stopped after four steps, and continued by `--resume`."""
    for split in ("train", "val"):
        fsspec.filesystem("s3").put(str(workspace.folder / split), f"{bucket}/{split}", recursive=True)
    where = {"data__train": f"{bucket}/train", "data__val": f"{bucket}/val", "storage": f"{bucket}/runs"}
    where["data__cache_dir"] = str(workspace.folder / "cache")
    left = train(config_of(workspace, "bucket", train__max_steps=4, train__checkpoint_upload="async", **where))
    assert left.last is not None
    assert left.last.startswith(f"{bucket}/runs/bucket/checkpoint_00000004_")
    with pytest.raises(RunError, match=f"{bucket}/runs/bucket .*--resume"):
        train(config_of(workspace, "bucket", **where))
    return train(config_of(workspace, "bucket", **where), resume="must")


@pytest.mark.slow
def test_train_in_a_bucket_has_the_losses_of_a_disk(workspace: Workspace, whole: RunRecord, resumed: RunRecord) -> None:
    assert resumed.status == "FINISHED"
    assert sorted(losses(workspace, resumed)) == list(range(1, STEPS + 1))
    assert losses(workspace, resumed) == losses(workspace, whole)


@pytest.mark.slow
def test_checkpoints_in_a_bucket_are_complete(workspace: Workspace, resumed: RunRecord, whole: RunRecord) -> None:
    known = repair(resumed.folder)
    assert known[-1].state.global_step == STEPS
    assert resumed.last == storage.join(resumed.folder, known[-1].name)
    kept = {each.name for each in known}
    assert {name for name in storage.subfolders(resumed.folder) if name.startswith("checkpoint_")} == kept
    with storage.local_copy(resumed.last) as folder:
        a, b = checkpoint.load(folder), checkpoint.load(whole.last or "")
    assert all(a.weights[name].equal(b.weights[name]) for name in b.weights)
    assert all(a.moments[name].equal(b.moments[name]) for name in b.moments)
    with checkpoint_folder(resumed.folder, "") as folder:
        assert checkpoint.load_inference(folder).state.global_step == STEPS
    client = mlflow.MlflowClient(workspace.tracking_uri)
    manifest = client.download_artifacts(resumed.run_id or "", "checkpoints.json")
    with open(manifest) as file:
        assert {row["path"] for row in json.load(file)} == {f"{resumed.folder}/{name}" for name in kept}


@pytest.mark.slow
def test_run_on_nodes_compiles_no_extension(whole: RunRecord, extensions: Path) -> None:
    assert list(extensions.rglob("*")) == []


def test_train_unshared_storage_raises(workspace: Workspace, cluster: Cluster) -> None:
    """Every process has its own `memory://`, as every host has its own /tmp."""
    with pytest.raises(RunError, match=r"node [\d.]+: storage memory://runs "):
        train(config_of(workspace, "unshared", storage="memory://runs"))
    assert not run_exists("memory://runs/unshared")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_workers": 3}, r"\b3 CPUs\b.*\b2\b"),
        ({"num_workers": 1, "cpus_per_worker": 2}, r"\b2 CPUs\b.*\b3 nodes\b.*\b0\b"),
        ({"num_workers": 2, "use_gpu": True}, r"\b2 GPUs\b.*\b0\b"),
    ],
)
def test_train_unplaceable_workers_raise_at_once(
    workspace: Workspace, cluster: Cluster, asked: dict[str, object], said: str
) -> None:
    start = time.monotonic()
    with pytest.raises(ResourceError, match=said):
        train(config_of(workspace, "large", **{f"scaling__{key}": value for key, value in asked.items()}))
    assert time.monotonic() - start < 20
    assert not run_exists(f"{workspace.folder}/runs/large")
