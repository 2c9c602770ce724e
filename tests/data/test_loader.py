"""Batches follow the plan for any world size, any number of workers and any resume point."""

import copy
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.data import write_shards
from support.paths import ROOT
from support.waiting import wait_until

from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.data.index import ShardIndex
from pipeline.data.loader import Batch, EvalLoader, TrainLoader
from pipeline.errors import ConfigError, ShardError

AUGMENT = AugmentConfig(scales=(40, 48, 56), max_size=90, crop_scales=(44, 60), crop_range=(30, 50), eval_size=48)
TRAIN = TrainConfig(global_batch=6, micro_batch=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("loader"), images=20)


def config(index: ShardIndex, workers: int = 0) -> DataConfig:
    return DataConfig(train=index.folder, val=index.folder, workers=workers, window=12, augment=AUGMENT)


def same(a: Batch, b: Batch) -> bool:
    tensors = ("images", "mask", "boxes_cxcywh", "labels", "target_offsets", "image_ids", "sizes")
    equal = all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
    return equal and (a.group, a.weight) == (b.group, b.weight)


def by_group(steps: list[list[Batch]]) -> dict[tuple[int, int], Batch]:
    return {(t, batch.group): batch for t, step in enumerate(steps) for batch in step if batch.weight}


def test_epoch_has_full_steps_without_repeats(index: ShardIndex) -> None:
    loader = TrainLoader(config(index), TRAIN, 42, 0, 1)
    steps = list(loader.epoch(0))
    assert len(steps) == loader.steps_per_epoch == 3
    assert loader.index.digest == index.digest
    ids = [i for step in steps for batch in step for i in batch.image_ids.tolist()]
    assert len(ids) == len(set(ids)) == 18
    for batch in (batch for step in steps for batch in step):
        assert len(batch) == 2
        assert batch.boxes_cxcywh.min() >= 0
        assert batch.boxes_cxcywh.max() <= 1
        rows = [index.samples.image_id.tolist().index(i) for i in batch.image_ids.tolist()]
        assert batch.sizes.tolist() == index.sizes()[rows].tolist(), "original sizes"


def test_epoch_depends_on_seed_and_number_only(index: ShardIndex) -> None:
    loader = TrainLoader(config(index), TRAIN, 42, 0, 1)
    first, again = list(loader.epoch(0)), list(loader.epoch(0))
    assert all(same(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    for other in (list(loader.epoch(1)), list(TrainLoader(config(index), TRAIN, 43, 0, 1).epoch(0))):
        assert not all(same(a, b) for x, y in zip(first, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_epoch_any_world_size_gives_equal_groups(index: ShardIndex, world: int) -> None:
    alone = by_group(list(TrainLoader(config(index), TRAIN, 42, 0, 1).epoch(1)))
    shares = [list(TrainLoader(config(index), TRAIN, 42, rank, world).epoch(1)) for rank in range(world)]
    assert {tuple(len(step) for step in share) for share in shares} == {(-(-3 // world),) * 3}
    merged = {key: batch for share in shares for key, batch in by_group(share).items()}
    assert sum(len(by_group(share)) for share in shares) == len(merged)
    assert merged.keys() == alone.keys()
    assert all(same(merged[key], alone[key]) for key in alone)


@pytest.mark.parametrize("workers", [1, 3])
def test_epoch_any_workers_give_equal_batches(index: ShardIndex, workers: int) -> None:
    alone, many = (TrainLoader(config(index, n), TRAIN, 42, 0, 1) for n in (0, workers))
    state = torch.get_rng_state()
    interrupted = many.epoch(0)
    next(interrupted)
    del interrupted  # an epoch that is left half way must not disturb the next
    processes = many.pool.processes()
    assert len(processes) == workers
    for epoch, start in ((0, 0), (1, 0), (1, 2), (0, 3)):
        expected, found = list(alone.epoch(epoch, start)), list(many.epoch(epoch, start))
        assert len(found) == 3 - start
        assert all(same(a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True))
    assert many.pool.processes() == processes
    assert torch.equal(torch.get_rng_state(), state), "loading draws nothing from the generator that dropout uses"


def test_epoch_world_changes_every_step_gives_same_batches(tmp_path: Path) -> None:
    """Killed after each step and resumed elsewhere: the uninterrupted epoch, each group once, bit for bit."""
    index = write_shards(tmp_path, images=40, samples_per_shard=7)
    data = config(index).model_copy(update={"mix_shards": 2})
    train = TrainConfig(global_batch=4, micro_batch=1)
    whole = by_group(list(TrainLoader(data, train, 7, 0, 1).epoch(3)))
    found: dict[tuple[int, int], Batch] = {}
    for step, (world, workers) in enumerate(itertools.product((1, 2, 4), (0, 1, 3))):
        for rank in range(world):
            loader = TrainLoader(data.model_copy(update={"workers": workers}), train, 7, rank, world)
            made = by_group([next(loader.epoch(3, start_step=step))])
            assert not found.keys() & {(step, group) for _, group in made}
            found |= {(step, group): batch for (_, group), batch in made.items()}
    assert found.keys() == {key for key in whole if key[0] < 9}
    assert all(same(found[key], whole[key]) for key in found)


@pytest.mark.parametrize("resample", ["reference", "fused"])
def test_epoch_pixels_do_not_depend_on_worker(index: ShardIndex, resample: str) -> None:
    """Other groups, ranks, workers and neighbours: the same sample in the same epoch has the same tensors."""
    augment = AUGMENT.model_copy(update={"resample": resample})
    base = config(index).model_copy(update={"augment": augment})
    seen: dict[int, Batch] = {}
    for train, workers, world in (
        (TrainConfig(global_batch=1, micro_batch=1), 0, 1),
        (TrainConfig(global_batch=4, micro_batch=1), 1, 2),
        (TrainConfig(global_batch=20, micro_batch=1), 3, 4),
    ):
        for rank in range(world):
            loader = TrainLoader(base.model_copy(update={"workers": workers}), train, 42, rank, world)
            for batch in itertools.chain(*loader.epoch(2)):
                known = seen.setdefault(int(batch.image_ids), batch)
                assert torch.equal(known.images, batch.images)
                assert torch.equal(known.boxes_cxcywh, batch.boxes_cxcywh)
                assert torch.equal(known.labels, batch.labels)
    assert len(seen) == 20


def test_epoch_fused_is_close_to_reference(index: ShardIndex) -> None:
    fused = config(index).model_copy(update={"augment": AUGMENT.model_copy(update={"resample": "fused"})})
    pairs = zip(*(TrainLoader(data, TRAIN, 42, 0, 1).epoch(0) for data in (config(index), fused)), strict=True)
    for step, other in pairs:
        for a, b in zip(step, other, strict=True):
            assert torch.equal(a.image_ids, b.image_ids)
            assert a.images.shape == b.images.shape
            assert torch.equal(a.mask, b.mask)
            assert (a.images.float() - b.images.float()).abs().mean() < 8
    evaluated = zip(*(EvalLoader(data, TRAIN.micro_batch, 0, 1) for data in (config(index), fused)), strict=True)
    assert all(same(a, b) for a, b in evaluated), "evaluation always takes the published resample"


def test_epoch_start_step_decodes_only_the_rest(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(TrainLoader(config(index), TRAIN, 42, 0, 1).epoch(2))
    loader = TrainLoader(config(index), TRAIN, 42, 0, 1)
    decoded: list[int] = []
    sample = loader.data.sample
    monkeypatch.setattr(loader.data, "sample", lambda i: decoded.append(i) or sample(i))
    rest = list(loader.epoch(2, start_step=1))
    assert all(same(a, b) for x, y in zip(whole[1:], rest, strict=True) for a, b in zip(x, y, strict=True))
    assert len(decoded) == 12


KILLED = """
import os, signal, sys
from pipeline.config import DataConfig, TrainConfig
from pipeline.data.loader import TrainLoader
if __name__ == "__main__":
    loader = TrainLoader(DataConfig(train=sys.argv[1], workers=2), TrainConfig(global_batch=2), 42, 0, 1)
    next(loader.epoch(0))
    print(*loader.pool.processes(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the state of processes from /proc")
def test_worker_processes_killed_parent_ends_them(index: ShardIndex, tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), index.folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    processes = [Path("/proc") / pid for pid in killed.stdout.split()]
    assert len(processes) == 2
    wait_until(lambda: not any(map(alive, processes)))


def alive(process: Path) -> bool:
    """False for an ended process, also if it is a zombie."""
    try:
        return "\nState:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_eval_loader_reads_every_image_once(index: ShardIndex, world: int, micro_batch: int) -> None:
    train = TRAIN.model_copy(update={"micro_batch": micro_batch})
    alone = {batch.group: batch for batch in EvalLoader(config(index), train.micro_batch, 0, 1)}
    loaders = [EvalLoader(config(index), train.micro_batch, rank, world) for rank in range(world)]
    batches = [batch for loader in loaders for batch in loader]
    assert len(batches) == sum(map(len, loaders)) == len(alone)
    assert sorted(i for batch in batches for i in batch.image_ids.tolist()) == index.samples.image_id.tolist()
    assert all(same(batch, alone[batch.group]) and batch.weight == 1.0 for batch in batches)
    for batch in batches:
        for image_mask, (height, width) in zip(batch.mask, batch.sizes.tolist(), strict=True):
            shown = ~image_mask
            side = (int(shown[:, 0].sum()), int(shown[0].sum()))
            assert min(side) == 48 or max(side) == 90
            assert abs(side[0] / side[1] - height / width) < 0.05


def test_pool_serves_training_and_evaluation(index: ShardIndex) -> None:
    alone, data = TrainLoader(config(index), TRAIN, 42, 0, 1), config(index, workers=2)
    train = TrainLoader(data, TRAIN, 42, 0, 1)
    evaluation = EvalLoader(data, TRAIN.micro_batch, 0, 1, train.pool)
    processes: set[int] = set()
    for epoch in range(2):
        expected, found = list(alone.epoch(epoch)), list(train.epoch(epoch))
        assert all(same(a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True))
        plain = list(EvalLoader(config(index), TRAIN.micro_batch, 0, 1))
        assert all(same(a, b) for a, b in zip(plain, evaluation, strict=True))
        processes |= set(train.pool.processes())
    assert len(processes) == 2, "they started once"
    next(train.epoch(0))  # left half way
    assert len(list(evaluation)) == len(plain)
    larger = data.model_copy(update={"augment": AUGMENT.model_copy(update={"eval_size": 64, "max_size": 128})})
    again = EvalLoader(larger, TRAIN.micro_batch, 0, 1, train.pool)
    assert max(batch.images.shape[-1] for batch in again) > 90, "another view of the same data set"
    assert sum(len(batch) for batch in evaluation) == 20


def test_pool_overtaken_run_raises(index: ShardIndex) -> None:
    train = TrainLoader(config(index, workers=1), TRAIN, 42, 0, 1)
    first = train.epoch(0)
    next(first)
    next(train.epoch(1))
    with pytest.raises(AssertionError, match="run"):
        next(first)


def test_eval_loader_can_be_repeated(index: ShardIndex) -> None:
    loader = EvalLoader(config(index, workers=1), TRAIN.micro_batch, 0, 1)
    assert all(same(a, b) for a, b in zip(loader, copy.copy(list(loader)), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_epoch_pad_multiple_rounds_sides_up_and_adds_padding_only(index: ShardIndex, workers: int) -> None:
    exact = [batch for step in TrainLoader(config(index), TRAIN, 42, 0, 1).epoch(0) for batch in step]
    data = config(index, workers).model_copy(update={"pad_multiple": 64})
    rounded = [batch for step in TrainLoader(data, TRAIN, 42, 0, 1).epoch(0) for batch in step]
    assert any(batch.images.shape != other.images.shape for batch, other in zip(exact, rounded, strict=True))
    for batch, other in zip(exact, rounded, strict=True):
        height, width = batch.images.shape[2:]
        assert other.images.shape[2:] == (-(-height // 64) * 64, -(-width // 64) * 64)
        assert torch.equal(other.images[:, :, :height, :width], batch.images)
        assert torch.equal(other.mask[:, :height, :width], batch.mask)
        assert other.mask[:, height:].all()
        assert other.mask[:, :, width:].all()
        assert not other.images[:, :, height:].any()
        assert torch.equal(other.boxes_cxcywh, batch.boxes_cxcywh)


@pytest.mark.parametrize("workers", [0, 1])
def test_epoch_damaged_shard_raises_shard_error(tmp_path: Path, workers: int) -> None:
    index = write_shards(tmp_path)
    path = Path(index.folder) / index.shards[1].name
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(ShardError, match=rf"^{path} "):
        list(TrainLoader(config(index, workers), TRAIN, 42, 0, 1).epoch(0))


def test_train_loader_wrap_and_bad_config(index: ShardIndex) -> None:
    big = TrainConfig(global_batch=32, micro_batch=2)
    with pytest.raises(ConfigError, match=r"train\.global_batch 32.*data\.tail=wrap"):
        TrainLoader(config(index), big, 42, 0, 1)
    wrapped = config(index).model_copy(update={"tail": "wrap"})
    (step,) = TrainLoader(wrapped, big, 42, 0, 1).epoch(0)
    assert {i for batch in step for i in batch.image_ids.tolist()} == set(index.samples.image_id.tolist())
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        TrainLoader(DataConfig(), TRAIN, 42, 0, 1)
    with pytest.raises(ConfigError, match=r"data\.val is not set"):
        EvalLoader(DataConfig(), TRAIN.micro_batch, 0, 1)
