"""A run's storage and its shards in an S3 bucket: real requests to a server of our own, from several processes."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from pyarrow.fs import FileSelector
from support.data import write_shards
from support.epochs import config, epoch_of, equal_epochs
from support.paths import ROOT
from support.s3 import elsewhere, free_port, s3_store, settings

from pipeline.config import ScalingConfig, load_config
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.verify import verify_shards
from pipeline.errors import RunError
from pipeline.files import storage
from pipeline.launch.driver import train
from pipeline.launch.nodes import prepare_nodes
from pipeline.runs.record import RunRecord, read_run, run_exists, write_run


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_store() as url:
        yield url


def test_storage_write_by_another_process_is_seen_at_once(bucket: str) -> None:
    """Listings are remembered by fsspec: a record would be cut at its old length, and a new file would not be there."""
    folder = f"{bucket}/seen/run"
    write_run(RunRecord("run", folder, {}))
    assert storage.subfolders(folder) == []  # from now on the listing is remembered
    assert storage.file_sizes(folder).keys() == {"run.json"}
    elsewhere(
        f"""
from dataclasses import replace
from pipeline.files import storage
from pipeline.runs import record as runs
storage.write_bytes({folder!r} + "/checkpoint_1/state.json", b"{{}}")
runs.write_run(replace(runs.read_run({folder!r}), last="a path that makes the record longer"))
"""
    )
    assert read_run(folder).last == storage.join(folder, "a path that makes the record longer")
    assert storage.subfolders(folder) == ["checkpoint_1"]
    assert storage.exists(f"{folder}/checkpoint_1/state.json")
    assert storage.file_sizes(f"{folder}/checkpoint_1") == {"state.json": 2}
    with storage.local_copy(f"{folder}/checkpoint_1") as copy:
        assert (copy / "state.json").read_bytes() == b"{}"
    storage.move(f"{folder}/checkpoint_1/state.json", f"{folder}/state.json")
    assert not storage.exists(f"{folder}/checkpoint_1")
    storage.remove(folder)
    assert not run_exists(folder)


def test_ray_storage_sees_new_objects(bucket: str) -> None:
    path, files = storage.ray_storage(f"{bucket}/ray")
    assert path == "bucket/ray"
    storage.write_bytes(f"{bucket}/ray/a/1", b"1")
    assert [info.base_name for info in files.get_file_info(FileSelector(f"{path}/a"))] == ["1"]
    elsewhere(f"from pipeline.files import storage; storage.write_bytes('{bucket}/ray/a/2', b'')")
    assert [info.base_name for info in files.get_file_info(FileSelector(f"{path}/a"))] == ["1", "2"]


def test_storage_mistyped_bucket_is_refused(bucket: str) -> None:
    with pytest.raises(RunError, match=r"storage s3://buckett/runs"):
        prepare_nodes(ScalingConfig(use_gpu=False), "s3://buckett/runs")
    assert fsspec.filesystem("s3").ls("") == ["bucket"]


@pytest.mark.parametrize(
    ("fault", "said"), [("credentials", "credentials"), ("server", "connect"), ("protocol", "not known: s4")]
)
def test_storage_without_answer_raises(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, said: str
) -> None:
    """Before a Ray is started."""
    folder = write_shards(tmp_path).folder
    url = "s4://bucket/runs" if fault == "protocol" else f"{bucket}/runs"
    if fault == "server":
        monkeypatch.setenv("AWS_ENDPOINT_URL", settings(free_port())["AWS_ENDPOINT_URL"])
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    elif fault == "credentials":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    overrides = {"storage": url, "data.train": folder, "data.val": folder, "model.num_classes": 3}
    with pytest.raises(RunError, match=rf"storage {url}: .*{said}"):
        train(load_config(ROOT / "jobs" / "configs" / "demo.yaml", overrides))
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_train_from_shards_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    """Through a worker process, which finds the bucket by itself."""
    local = write_shards(tmp_path, images=24, samples_per_shard=3)
    remote = build_shards(tmp_path / "instances.json", tmp_path / "images", f"{bucket}/shards", samples_per_shard=3)
    assert remote.digest == local.digest
    assert verify_shards(remote.folder) == []
    batches = epoch_of(config(remote.folder, tmp_path / "cache", workers=1))
    assert equal_epochs(epoch_of(config(local.folder, tmp_path)), batches)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(local.shards)
