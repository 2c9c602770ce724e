"""Batches for one rank: `TrainLoader` follows the epoch's plan, `EvalLoader` reads every validation image once.

`plan` decides the order, so it does not depend on the workers or the world size. A sample's augmentation depends only
on (seed, epoch, sample), so its content does not depend on them either. Faults of the data are ShardErrors.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.data.balance import Epoch, draw_epoch, epoch_length, read_factors
from pipeline.data.batch import Batch
from pipeline.data.cache import GIB, ShardCache, check_cache
from pipeline.data.dataset import DetectionDataset
from pipeline.data.group import Request
from pipeline.data.index import ShardIndex
from pipeline.data.plan import assign_groups, eval_plan, max_overlap, shard_uses, steps_per_epoch, train_plan
from pipeline.data.prefetch import Prefetcher
from pipeline.data.transforms import EvalSize, Views, draw_views, evaluation_views, join_views
from pipeline.data.worker_pool import WorkerPool
from pipeline.errors import ConfigError
from pipeline.files.shard_files import Store

Ints = NDArray[np.int64]


class TrainLoader:
    """This rank's pad groups of every optimizer step, one epoch at a time.

    Args:
        data: where the shards are, augmentation, grouping and workers.
        train: batch sizes.
        seed: of the run.
        rank: of this process.
        world: number of ranks.
        pool: the processes to use; without it the loader starts its own.

    Raises:
        ConfigError: `data.train` is not set, an epoch has no step, or the cache is too small.
        ShardError: see `dataset.DetectionDataset`.
    """

    def __init__(
        self, data: DataConfig, train: TrainConfig, seed: int, rank: int, world: int, pool: WorkerPool | None = None
    ) -> None:
        self._config, self._train, self._seed = data, train, seed
        self.data = open_dataset(data.train, "data.train", data, max(data.window, train.global_batch))
        self.index: ShardIndex = self.data.index
        self._factors = read_factors(data) if data.balance else None
        samples = len(self.index) if self._factors is None else epoch_length(self._factors)
        self.steps_per_epoch = steps_per_epoch(samples, train.global_batch, data.tail)
        extras = data.augment.extras()
        self._extras = extras if extras.scenes or extras.colours else None
        self._turns = assign_groups(train.global_batch // train.pad_group, rank, world)
        self.pool = pool or WorkerPool(data.workers)
        self._source = self.pool.add(self.data)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield one list of batches per optimizer step, from `start_step` on; earlier steps are not decoded.

        Every rank gets lists of the same length: missing groups are replaced by batches of weight 0.
        """
        shown = self._shown(epoch)
        views = self._views(shown, epoch)
        mine = self._plan(views.out_size, shown, epoch)[start_step:, [turn.group for turn in self._turns]]
        largest = _padded_bytes(views.out_size[mine], self._config.augment, self._config.pad_multiple)
        with _prefetcher(self.data, [shown.samples[step.ravel()] for step in mine], self._config) as prefetcher:
            made = self.pool.run(self._requests(mine, shown, views, epoch, prefetcher), largest)
            for step in range(len(mine)):
                batches = [next(made) for _ in self._turns]
                prefetcher.done(step)
                yield batches

    def padded_sizes(self, epoch: int) -> Ints:
        """(height, width) of every pad group of an epoch, of all ranks, [steps, groups, 2]; no image is read."""
        shown = self._shown(epoch)
        sizes = self._views(shown, epoch).out_size
        largest: Ints = sizes[self._plan(sizes, shown, epoch)].max(axis=2)
        return -(-largest // self._config.pad_multiple) * self._config.pad_multiple

    def _shown(self, epoch: int) -> Epoch:
        if self._factors is not None:
            return draw_epoch(self._factors, self._seed, epoch)
        samples = np.arange(len(self.index))
        return Epoch(samples, np.zeros_like(samples))

    def _views(self, shown: Epoch, epoch: int) -> Views:
        """The views of the samples that an epoch shows; a sample that it shows again has others."""
        sizes, augment = self.index.sizes(), self._config.augment
        parts = [
            draw_views(sizes, self._seed, epoch, augment, copy).take(shown.samples[shown.copies == copy])
            for copy in range(int(shown.copies.max(initial=0)) + 1)
        ]
        return join_views(parts).take(np.argsort(np.argsort(shown.copies, kind="stable")))

    def _plan(self, sizes: Ints, shown: Epoch, epoch: int) -> Ints:
        """The numbers in `shown`, [steps, groups, micro_batch]."""
        return train_plan(
            sizes,
            self.index.samples.shard[shown.samples],
            digest=self.index.digest,
            seed=self._seed,
            epoch=epoch,
            micro_batch=self._train.pad_group,
            global_batch=self._train.global_batch,
            mix_shards=self._config.mix_shards,
            window=self._config.window,
            tail=self._config.tail,
        )

    def _requests(
        self, mine: Ints, shown: Epoch, views: Views, epoch: int, prefetcher: Prefetcher
    ) -> Iterator[Request]:
        fused, multiple = self._config.augment.resample == "fused", self._config.pad_multiple
        for number, step in enumerate(mine):
            prefetcher.begin(number)
            for turn, group in zip(self._turns, step.tolist(), strict=True):
                samples, seen = tuple(shown.samples[group].tolist()), tuple(views[i] for i in group)
                copies = shown.copies[group].tolist() if self._extras else []
                keys = tuple((self._seed, epoch, i, copy) for i, copy in zip(samples, copies, strict=False))
                yield Request(self._source, samples, seen, fused, turn.group, turn.weight, multiple, self._extras, keys)


class EvalLoader:
    """This rank's groups of the validation set. All ranks together read each image once; some ranks may read more.

    With several `eval_sizes` a group is yielded once in each size, in their order, before the next group. The first
    size decides the groups, of `micro_batch` images each. Only `max_images` are read if that is less than there are.
    Other args and errors as in TrainLoader, with `data.val`.
    """

    def __init__(
        self,
        data: DataConfig,
        micro_batch: int,
        rank: int,
        world: int,
        pool: WorkerPool | None = None,
        eval_sizes: Sequence[EvalSize] = (),
        max_images: int | None = None,
    ) -> None:
        self._config = data
        self.data = open_dataset(data.val, "data.val", data, 1)
        self.index: ShardIndex = self.data.index
        self.eval_sizes = tuple(eval_sizes) or (EvalSize.default(data.augment),)
        self._views = [evaluation_views(self.index.sizes(), size) for size in self.eval_sizes]
        sizes, shards = self._views[0].out_size, self.index.samples.shard
        self.groups = eval_plan(sizes, shards, micro_batch, data.mix_shards, max_images)
        self._mine = range(rank, len(self.groups), world)
        self.pool = pool or WorkerPool(data.workers)
        self._source = self.pool.add(self.data)

    def __len__(self) -> int:
        return len(self._mine) * len(self.eval_sizes)

    @property
    def images(self) -> int:
        """Images in this rank's groups."""
        return sum(len(self.groups[j]) for j in self._mine)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(self._mine)

    def batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """The batches of the groups with these numbers, which need not be this rank's; a new call ends older ones."""
        groups = [np.array(self.groups[j]) for j in numbers]
        sizes = (_padded_bytes(v.out_size[group], self._config.augment) for group in groups for v in self._views)
        with _prefetcher(self.data, groups, self._config) as prefetcher:
            made = self.pool.run(self._requests(numbers, prefetcher), max(sizes, default=0))
            for number, batch in enumerate(made, start=1):
                if number % len(self.eval_sizes) == 0:
                    prefetcher.done(number // len(self.eval_sizes) - 1)
                yield batch

    def _requests(self, numbers: Sequence[int], prefetcher: Prefetcher) -> Iterator[Request]:
        for number, j in enumerate(numbers):
            prefetcher.begin(number)
            for views in self._views:
                yield Request(self._source, self.groups[j], tuple(views[i] for i in self.groups[j]), False, j, 1.0)


def is_cached(data: DataConfig) -> bool:
    """Whether shards of `data` are read through the node's cache. Raises ShardError for an invalid address."""
    return data.cache_gib > 0 and any(Store(folder).remote for folder in (data.train, data.val) if folder)


def open_dataset(folder: str, key: str, data: DataConfig, span: int) -> DetectionDataset:
    """Open the data set at `folder`, the value of the setting `key`, with the cache that `data` describes.

    `span` is the number of samples within which the order is rearranged, see `plan.max_open_shards`.
    """
    if not folder:
        raise ConfigError(f"{key} is not set; give it a folder written by `python -m jobs.shard build`")
    limit = int(data.cache_gib * GIB)
    opened = DetectionDataset(folder, data.labels, ShardCache(data.cache_dir, limit) if limit else None)
    check_cache(opened.index, key, data, span)
    if opened.reader.cache is not None:
        opened.reader.cache.make_folder()  # refuses a folder that cannot be the cache before any work
    return opened


def _prefetcher(data: DetectionDataset, steps: Sequence[Ints], config: DataConfig) -> Prefetcher:
    """A prefetcher for the samples of each step; without a cache it does nothing."""
    shards, cache = data.index.shards, data.reader.cache
    read: list[tuple[int, int, int]] = []
    ahead = 0
    if cache is not None and len(steps):
        numbers = np.repeat(np.arange(len(steps)), [len(step) for step in steps])
        read = shard_uses(numbers, data.index.samples.shard[np.concatenate(steps)])
        fit = cache.limit // max(shard.bytes for shard in shards)
        ahead = min(config.mix_shards, max(1, fit - max_overlap(read)))
    return Prefetcher(
        lambda shard: data.reader.prefetch(shards[shard]), lambda shard: data.reader.release(shards[shard]), read, ahead
    )


def _padded_bytes(sizes: Ints, augment: AugmentConfig, multiple: int = 1) -> int:
    """Bytes for the largest padded group of `sizes` [..., B, 2], and at least for B images of `max_size` squared."""
    sides = -(-sizes.max(axis=-2, initial=1) // multiple) * multiple
    largest = -(-augment.max_size // multiple) * multiple
    return int(3 * sizes.shape[-2] * sides.prod(axis=-1).max(initial=largest**2))
