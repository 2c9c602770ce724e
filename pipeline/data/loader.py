"""Batches for one rank: `TrainLoader` by the epoch's plan, `EvalLoader` over every validation image once.

Used by the engine's epoch loop and by the evaluator. The order is `plan`'s, so it does not depend on workers or world
size; a sample's augmentation depends only on (seed, epoch, image id), so neither does its content. Faults of the data
are `ShardError`s and reach the training process as such, whichever process met them.

Worker processes come from a fork server, not from fork: a Ray worker runs gRPC threads, and a fork of it may inherit a
lock that nobody will release. The fork server is a fresh process that imports torch once; its children start quickly,
share that memory, live as long as the loader, and end when the training process dies.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.data.batch import Batch, Item, collate
from pipeline.data.dataset import DetectionDataset
from pipeline.data.index import ShardIndex
from pipeline.data.plan import Assigned, assign, eval_plan, steps_per_epoch, train_plan
from pipeline.data.transforms import View, apply, draw, evaluation_view, generator
from pipeline.errors import ConfigError, PipelineError

PREFETCH = 2  # groups in work per loader process


@dataclass(frozen=True)
class _Request:
    """One pad group to make: all that a worker needs to know."""

    assigned: Assigned
    epoch: int | None  # None: the evaluation view


class _GroupMaker:
    """Turns requests into batches; what the DataLoader calls its data set. Runs in the loader's processes."""

    def __init__(self, data: DetectionDataset, augment: AugmentConfig, seed: int) -> None:
        self.data, self._augment, self._seed = data, augment, seed

    def view(self, i: int, epoch: int | None) -> View:
        samples = self.data.index.samples
        size = (int(samples.height[i]), int(samples.width[i]))
        if epoch is None:
            return evaluation_view(size, self._augment)
        return draw(generator(self._seed, epoch, int(samples.image_id[i])), size, self._augment)

    def sizes(self, epoch: int | None) -> NDArray[np.int64]:
        """(h, w) of every sample as it will be seen, [S, 2]; decodes nothing."""
        views = (self.view(i, epoch) for i in range(len(self.data)))
        return np.array([view.out_size for view in views], np.int64).reshape(-1, 2)

    def __getitem__(self, request: _Request) -> Batch | PipelineError:
        # DataLoader re-raises an exception with the worker's traceback as its message; as a value it stays readable.
        try:
            items = [self._item(i, request.epoch) for i in request.assigned.samples]
        except PipelineError as error:
            return error
        return collate(items, request.assigned.group, request.assigned.weight)

    def _item(self, i: int, epoch: int | None) -> Item:
        sample = self.data.sample(i)
        size = (sample.image.height, sample.image.width)
        image, boxes, labels = apply(sample.image, sample.boxes_xyxy, sample.labels, self.view(i, epoch))
        return Item(image, boxes, labels, sample.image_id, size)


class _Requests:
    """The DataLoader's sampler: the list to work through next. A plain list would be copied when the loader is made."""

    def __init__(self) -> None:
        self.items: list[_Request] = []

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class _Pipe:
    """Requests in, batches out in the same order, made in this process or in `workers` others that stay alive."""

    def __init__(self, maker: _GroupMaker, workers: int) -> None:
        self._requests = _Requests()
        options: dict[str, Any] = {}
        if workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            options = {
                "multiprocessing_context": context,
                "persistent_workers": True,
                "prefetch_factor": PREFETCH,
                "worker_init_fn": _die_with_parent,
            }
        self._loader: DataLoader[Any] = DataLoader(
            maker,  # type: ignore[arg-type]  # DataLoader only calls __getitem__, with what the sampler yields
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            collate_fn=_identity,
            generator=torch.Generator(),  # else each pass draws from the global generator, and dropout would change
            **options,
        )

    def run(self, requests: list[_Request]) -> Iterator[Batch]:
        self._requests.items = requests
        for made in self._loader:
            if isinstance(made, PipelineError):
                raise made
            yield made


class TrainLoader:
    """This rank's share of every optimizer step, epoch by epoch.

    Args:
        data: where the shards are, augmentation, grouping and workers.
        train: batch sizes.
        seed: of the run.
        rank: of this process.
        world: number of ranks.

    Raises:
        ConfigError: no `data.train`, or an epoch without a step.
        ShardError: see `dataset.DetectionDataset`.
    """

    def __init__(self, data: DataConfig, train: TrainConfig, seed: int, rank: int, world: int) -> None:
        self._data, self._train, self._seed, self._rank, self._world = data, train, seed, rank, world
        self._maker = _maker(data.train, "data.train", data, seed)
        self.index: ShardIndex = self._maker.data.index
        self.steps_per_epoch = steps_per_epoch(len(self.index), train.global_batch, data.tail)
        self._pipe = _Pipe(self._maker, data.workers)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """One list of batches per optimizer step, from `start_step` on (steps before it are not decoded).

        Every rank gets lists of the same length; a batch of weight 0 only keeps the ranks in step.
        """
        steps = train_plan(
            self._maker.sizes(epoch),
            digest=self.index.digest,
            seed=self._seed,
            epoch=epoch,
            micro_batch=self._train.micro_batch,
            global_batch=self._train.global_batch,
            window=self._data.window,
            tail=self._data.tail,
        )
        mine = [assign(step, self._rank, self._world) for step in steps[start_step:]]
        made = self._pipe.run([_Request(assigned, epoch) for step in mine for assigned in step])
        for step in mine:
            yield [next(made) for _ in step]


class EvalLoader:
    """This rank's groups of the validation set, each image exactly once over all ranks; ranks may be uneven.

    Args and errors as in TrainLoader, with `data.val`.
    """

    def __init__(self, data: DataConfig, train: TrainConfig, rank: int, world: int) -> None:
        self._maker = _maker(data.val, "data.val", data, seed=0)  # evaluation draws nothing
        self.data = self._maker.data
        self.index: ShardIndex = self.data.index
        groups = eval_plan(self._maker.sizes(None), train.micro_batch)
        self._mine = [_Request(Assigned(j, groups[j], 1.0), None) for j in range(rank, len(groups), world)]
        self._pipe = _Pipe(self._maker, data.workers)

    def __len__(self) -> int:
        return len(self._mine)

    def __iter__(self) -> Iterator[Batch]:
        return self._pipe.run(self._mine)


def _maker(folder: str, key: str, data: DataConfig, seed: int) -> _GroupMaker:
    if not folder:
        raise ConfigError(f"{key} is not set; give it a folder written by `python -m jobs.shard build`")
    return _GroupMaker(DetectionDataset(folder, data.labels), data.augment, seed)


def _die_with_parent(worker: int) -> None:
    """End this worker when the training process is gone, even by SIGKILL.

    DataLoader's own watch looks at the parent's pid: here the fork server's, which lives as long as a worker does.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _identity(made: Any) -> Any:
    return made
