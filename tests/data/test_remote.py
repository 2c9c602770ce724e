"""Training from an object store with real loaders: one download per node, retries, and the name of a lost shard."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.data import write_shards
from support.epochs import TRAIN, config, epoch_of, equal_epochs, same
from support.model import SMALL
from support.store import flaky_store, http_store
from support.waiting import wait_until

from pipeline.config import DataConfig, LossConfig, ModelConfig, OptimConfig
from pipeline.data import cache as cache_module
from pipeline.data import loader as loader_module
from pipeline.data.index import INDEX, SAMPLES, ShardIndex, load_index
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.engine.backend import PlainBackend
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.errors import ConfigError, ShardError
from pipeline.evaluation.coco import ground_truth
from pipeline.model import build_criterion, build_model
from pipeline.runtime import single


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("remote"), images=24, samples_per_shard=3)


def test_loader_foreign_cache_folder_is_refused(index: ShardIndex, tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with flaky_store() as store, pytest.raises(ConfigError, match=r"data\.cache_dir"):
        TrainLoader(config(f"flaky://{index.folder}", tmp_path), TRAIN, 0, 0, 1)
    assert not [name for name in store.reads if name.endswith(".tar")]


def test_loader_failing_store_gives_same_epoch(index: ShardIndex, tmp_path: Path) -> None:
    expected = epoch_of(config(index.folder, tmp_path))
    with flaky_store(fail_every=3) as store:
        remote = config(f"flaky://{index.folder}", tmp_path)
        assert equal_epochs(expected, epoch_of(remote))
        assert {store.reads[shard.name] for shard in index.shards} == {1}
        assert equal_epochs(epoch_of(config(index.folder, tmp_path), epoch=1), epoch_of(remote, epoch=1))
        assert {store.reads[shard.name] for shard in index.shards} == {1}, "the second epoch downloads nothing"
        assert len(list(EvalLoader(remote, TRAIN.micro_batch, 0, 1))) == 12


def test_loader_failing_store_without_cache_gives_same_epoch(index: ShardIndex, tmp_path: Path) -> None:
    with flaky_store(fail_every=3):
        remote = config(f"flaky://{index.folder}", tmp_path / "unused", cache_gib=0)
        assert equal_epochs(epoch_of(config(index.folder, tmp_path)), epoch_of(remote))
    assert not (tmp_path / "unused").exists()


def engine() -> Engine:
    torch.manual_seed(0)
    backbone = {"name": "conv5", "weights": "none", "norm": "group", "width": 8}
    model = build_model(ModelConfig(**{**SMALL, "op": "torch", "num_classes": 3, "backbone": backbone}))
    module = LossModule(model, build_criterion(LossConfig()))
    return Engine(module, PlainBackend(module, OptimConfig(), torch.device("cpu")), single(), seed=0)


def train(data: DataConfig, losses: list[float]) -> None:
    """An epoch; its losses are added as they come."""
    trained = engine()
    for step, groups in enumerate(TrainLoader(data, TRAIN, 0, 0, 1).epoch(0)):
        losses.append(trained.train_step(groups, step).losses["loss"])


def test_training_passing_faults_continue_lost_shard_stops(index: ShardIndex, tmp_path: Path) -> None:
    expected: list[float] = []
    through: list[float] = []
    done: list[float] = []
    train(config(index.folder, tmp_path), expected)
    with flaky_store(fail_every=3):
        train(config(f"flaky://{index.folder}", tmp_path / "a"), through)
    assert through == expected
    assert len(through) == 6
    first = next(TrainLoader(config(index.folder, tmp_path), TRAIN, 0, 0, 1).epoch(0))
    images = np.concatenate([batch.image_ids.numpy() for batch in first])
    needed = set(index.samples.shard[np.searchsorted(index.samples.image_id, images)].tolist())
    lost = next(shard for number, shard in enumerate(index.shards) if number not in needed)
    message = rf"{lost.name}.*\b\d{{12}}\b"
    with flaky_store(fail_every=3, gone=frozenset({lost.name})), pytest.raises(ShardError, match=message):
        train(config(f"flaky://{index.folder}", tmp_path / "b"), done)
    assert 1 <= len(done) < 6
    assert done == expected[: len(done)], "what could be trained was trained"


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (3, 2)])
def test_loader_ranks_of_a_node_download_once(index: ShardIndex, tmp_path: Path, world: int, workers: int) -> None:
    """Ranks and workers are processes of their own, and a server that fails now and then counts what they fetch."""
    with http_store(index.folder, fail_every=5) as server:
        data = config(server.url, tmp_path / "cache", workers)
        assert equal_epochs(epoch_of(config(index.folder, tmp_path)), epoch_of(data, world))
        assert {server.reads[shard.name] for shard in index.shards} == {1}
        assert server.reads[INDEX] == server.reads[SAMPLES] == world
        sizes = [path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")]
        assert sorted(sizes) == sorted(shard.bytes for shard in index.shards)


def test_loader_lost_shard_in_worker_is_raised(index: ShardIndex, tmp_path: Path) -> None:
    lost = index.shards[5].name
    with http_store(index.folder, gone=frozenset({lost})) as server:
        data = config(server.url, tmp_path, workers=1)
        with pytest.raises(ShardError, match=f"{server.url}/{lost}"):
            epoch_of(data)


def tight(index: ShardIndex, monkeypatch: pytest.MonkeyPatch, less: int = 0) -> float:
    """`data.cache_gib` for the five largest shards, less some bytes, where a GiB is a MiB."""
    for module in (loader_module, cache_module):
        monkeypatch.setattr(module, "GIB", 2**20)
    return (sum(sorted(shard.bytes for shard in index.shards)[-5:]) - less) / 2**20


def test_loader_small_cache_downloads_once(index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight shards through room for five: two blocks of two and one more; nothing is evicted that is still needed."""
    limit = tight(index, monkeypatch)
    with flaky_store() as store:
        data = config(f"flaky://{index.folder}", tmp_path / "cache", cache_gib=limit)
        steps = TrainLoader(data, TRAIN, 0, 0, 1).epoch(0)
        for step, expected in zip(steps, epoch_of(config(index.folder, tmp_path)), strict=True):
            assert all(same(a, b) for a, b in zip(step, expected, strict=True))
            kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar"))
            assert kept <= limit * 2**20
        assert {store.reads[shard.name] for shard in index.shards} == {1}


def test_loader_too_small_cache_is_refused(index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tight(index, monkeypatch, less=1)
    with flaky_store():
        data = config(f"flaky://{index.folder}", tmp_path, cache_gib=limit)
        with pytest.raises(ConfigError, match=r"data\.cache_gib=.*data\.train.*data\.mix_shards=2"):
            TrainLoader(data, TRAIN, 0, 0, 1)
        with pytest.raises(ConfigError, match=r"data\.cache_gib=.*data\.val"):
            EvalLoader(data, TRAIN.micro_batch, 0, 1)
    TrainLoader(config(index.folder, tmp_path, cache_gib=limit), TRAIN, 0, 0, 1)  # a local folder needs no cache


def test_loader_prefetches_next_shards(index: ShardIndex, tmp_path: Path) -> None:
    import time

    with flaky_store() as store:
        steps = TrainLoader(config(f"flaky://{index.folder}", tmp_path), TRAIN, 0, 0, 1).epoch(0)
        next(steps)
        wait_until(lambda: len(list(tmp_path.glob("*.tar"))) >= 4)
        time.sleep(0.2)
        assert 4 <= len(list(tmp_path.glob("*.tar"))) <= 5, "those of now and as many again, not all"
        list(steps)
        assert {store.reads[shard.name] for shard in index.shards} == {1}


def test_load_index_failing_store_is_retried(index: ShardIndex) -> None:
    with flaky_store(fail_every=2):
        assert load_index(f"flaky://{index.folder}").digest == index.digest
    with flaky_store(gone=frozenset({INDEX})), pytest.raises(ShardError, match=INDEX):
        load_index(f"flaky://{index.folder}")
    with flaky_store(fail_every=1), pytest.raises(ShardError, match=r"index\.json.*connection reset"):
        load_index(f"flaky://{index.folder}")


def test_ground_truth_uses_cache(index: ShardIndex, tmp_path: Path) -> None:
    with flaky_store() as store:
        evaluation = EvalLoader(config(f"flaky://{index.folder}", tmp_path), TRAIN.micro_batch, 0, 1)
        assert len(ground_truth(evaluation.data)["images"]) == 24
        assert {store.reads[shard.name] for shard in index.shards} == {1}
    assert ground_truth(index.folder) == ground_truth(evaluation.data), "what is cached needs no store"
