"""Batches for one rank: `TrainLoader` by the epoch's plan, `EvalLoader` over every validation image once.

Used by the engine's epoch loop and by the evaluator. The order is `plan`'s, so it does not depend on workers or world
size; a sample's augmentation depends only on (seed, epoch, sample), so neither does its content. Faults of the data are
`ShardError`s.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.cache import ShardCache
from pipeline.data.dataset import DetectionDataset
from pipeline.data.index import ShardIndex
from pipeline.data.plan import assign, eval_plan, first_uses, steps_per_epoch, train_plan
from pipeline.data.prefetch import Prefetcher
from pipeline.data.transforms import Views, draw, evaluation_views
from pipeline.data.workers import Request, WorkerPool
from pipeline.errors import ConfigError

GIB = 2**30


class TrainLoader:
    """This rank's share of every optimizer step, epoch by epoch.

    Args:
        data: where the shards are, augmentation, grouping and workers.
        train: batch sizes.
        seed: of the run.
        rank: of this process.
        world: number of ranks.
        pool: the processes to use; by default the loader has its own.

    Raises:
        ConfigError: no `data.train`, an epoch without a step, or a cache that is too small.
        ShardError: see `dataset.DetectionDataset`.
    """

    def __init__(
        self, data: DataConfig, train: TrainConfig, seed: int, rank: int, world: int, pool: WorkerPool | None = None
    ) -> None:
        self._data, self._train, self._seed = data, train, seed
        self.data = open_dataset(data.train, "data.train", data)
        self.index: ShardIndex = self.data.index
        self.steps_per_epoch = steps_per_epoch(len(self.index), train.global_batch, data.tail)
        self._turns = assign(train.global_batch // train.micro_batch, rank, world)
        self.pool = pool or WorkerPool(data.workers)
        self._source = self.pool.add(self.data)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """One list of batches per optimizer step, from `start_step` on (steps before it are not decoded).

        Every rank gets lists of the same length; a batch of weight 0 only keeps the ranks in step.
        """
        views = draw(self.index.sizes(), self._seed, epoch, self._data.augment)
        steps = train_plan(
            views.out_size,
            self.index.samples.shard,
            digest=self.index.digest,
            seed=self._seed,
            epoch=epoch,
            micro_batch=self._train.micro_batch,
            global_batch=self._train.global_batch,
            mix_shards=self._data.mix_shards,
            window=self._data.window,
            tail=self._data.tail,
        )
        mine = steps[start_step:, [turn.group for turn in self._turns]]
        largest = _bytes(views.out_size[mine], self._data.augment)
        with _prefetcher(
            self.data, mine.reshape(len(mine), mine[0].size if len(mine) else 0), self._data.mix_shards
        ) as prefetcher:
            made = self.pool.run(self._requests(mine, views, prefetcher), largest)
            for _ in range(len(mine)):
                yield [next(made) for _ in self._turns]

    def _requests(self, mine: NDArray[np.int64], views: Views, prefetcher: Prefetcher) -> Iterator[Request]:
        fused = self._data.augment.resample == "fused"
        for number, step in enumerate(mine):
            prefetcher.advance(number)
            for turn, samples in zip(self._turns, step.tolist(), strict=True):
                seen = tuple(views[i] for i in samples)
                yield Request(self._source, tuple(samples), seen, fused, turn.group, turn.weight)


class EvalLoader:
    """This rank's groups of the validation set, each image exactly once over all ranks; ranks may be uneven.

    Args and errors as in TrainLoader, with `data.val`.
    """

    def __init__(
        self, data: DataConfig, train: TrainConfig, rank: int, world: int, pool: WorkerPool | None = None
    ) -> None:
        self.data = open_dataset(data.val, "data.val", data)
        self.index: ShardIndex = self.data.index
        self._config = data
        self._views = evaluation_views(self.index.sizes(), data.augment)
        groups = eval_plan(self._views.out_size, self.index.samples.shard, train.micro_batch, data.mix_shards)
        self._mine = [(j, groups[j]) for j in range(rank, len(groups), world)]
        self.pool = pool or WorkerPool(data.workers)
        self._source = self.pool.add(self.data)

    def __len__(self) -> int:
        return len(self._mine)

    def __iter__(self) -> Iterator[Batch]:
        groups = [group for _, group in self._mine]
        largest = max((_bytes(self._views.out_size[[group]], self._config.augment) for group in groups), default=0)
        with _prefetcher(self.data, groups, self._config.mix_shards) as prefetcher:
            yield from self.pool.run(self._requests(prefetcher), largest)

    def _requests(self, prefetcher: Prefetcher) -> Iterator[Request]:
        for number, (j, group) in enumerate(self._mine):
            prefetcher.advance(number)
            yield Request(self._source, group, tuple(self._views[i] for i in group), False, j, 1.0)


def open_dataset(folder: str, key: str, data: DataConfig) -> DetectionDataset:
    """The data set at `folder`, the value of the setting `key`, with the cache that `data` describes.

    Raises:
        ConfigError: there is no folder, or the cache holds too few of its shards.
        ShardError: see `dataset.DetectionDataset`.
    """
    if not folder:
        raise ConfigError(f"{key} is not set; give it a folder written by `python -m jobs.shard build`")
    limit = int(data.cache_gib * GIB)
    opened = DetectionDataset(folder, data.labels, ShardCache(data.cache_dir, limit) if limit else None)
    if opened.reader.cache is not None:
        _check_cache(opened.index, key, limit, data.mix_shards)
    return opened


def _check_cache(index: ShardIndex, key: str, limit: int, mix_shards: int) -> None:
    """Two blocks are read from at a time; with less room each shard would be downloaded again and again."""
    sizes = sorted((shard.bytes for shard in index.shards), reverse=True)
    need = sum(sizes[: 2 * mix_shards + 1])
    if need > limit:
        raise ConfigError(
            f"data.cache_gib={limit / GIB:.3g} is too small for {key}: its order reads from up to {2 * mix_shards} "
            f"shards at a time, {need / GIB:.2f} GiB; raise it, lower data.mix_shards={mix_shards}, or set "
            "data.cache_gib=0 to read each sample over the network"
        )


def _bytes(sizes: NDArray[np.int64], augment: AugmentConfig) -> int:
    """Bytes for the padded images of any group, sizes [..., B, 2]; at least those of the largest usual image."""
    area = sizes.max(axis=-2, initial=1).prod(axis=-1).max(initial=augment.max_size**2)
    return int(3 * sizes.shape[-2] * area)


def _prefetcher(data: DetectionDataset, steps: Iterable[Sequence[int] | NDArray[np.int64]], ahead: int) -> Prefetcher:
    """One for the samples of each step; it has nothing to do where there is no cache."""
    uses: list[tuple[int, int]] = []
    if data.reader.cache is not None:
        parts = [np.asarray(step) for step in steps]
        numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        uses = first_uses(numbers, data.index.samples.shard[np.concatenate(parts)]) if parts else []
    return Prefetcher(lambda shard: data.reader.prefetch(data.index.shards[shard]), uses, ahead)
