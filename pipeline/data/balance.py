"""Repeat-factor sampling (`data.balance`): images with rare classes are seen more often. Gupta et al., LVIS, 2019.

An image's repeat factor is the largest of its classes', max(1, sqrt(t / f)), where f is the share of images that
contain the class and t the threshold. Each epoch shows an image floor or ceil of its factor times, on average the
factor, and all epochs have the same number of samples. Everything is a function of the shards, the threshold, the
seed and the epoch, so it depends neither on the world size nor on where a run is resumed. Fractions are integers, the
same on every machine. The classes of all samples are read once, at the start; a damaged shard is a ShardError.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DataConfig
from pipeline.data.dataset import DetectionDataset

Ints = NDArray[np.int64]
ONE = 2**20  # a factor of 1
REPEATS = 3  # separates this stream from others that are seeded by (seed, epoch)
REMOTE_READERS = 16  # threads, because a remote store answers slowly; descriptors of local tars serve one thread


@dataclass(frozen=True, eq=False)
class Epoch:
    """The samples that an epoch shows, before they are ordered."""

    samples: Ints  # [N] positions in the index, ascending
    copies: Ints  # [N] 0 for the first time that an epoch shows a sample, 1 for the second, ...


def repeat_factors(classes: Sequence[frozenset[int]], threshold: float) -> Ints:
    """The repeat factor of each image in units of 1/ONE.

    Their sum is a whole number: the largest factor is raised by what is missing.

    Args:
        classes: of each image, those of its boxes.
        threshold: see the module.
    """
    counts: dict[int, int] = {}
    for found in classes:
        for one in found:
            counts[one] = counts.get(one, 0) + 1
    factor = {one: max(1.0, math.sqrt(threshold * len(classes) / count)) for one, count in counts.items()}
    factors = np.array([round(ONE * max((factor[one] for one in found), default=1.0)) for found in classes], np.int64)
    if len(factors):
        factors[factors.argmax()] += -factors.sum() % ONE
    return factors


def epoch_length(factors: Ints) -> int:
    """Samples of an epoch: the sum of the factors."""
    return int(factors.sum()) // ONE


def draw_epoch(factors: Ints, seed: int, epoch: int) -> Epoch:
    """The samples of one epoch, `epoch_length` in all.

    The images lie in a random order on a line, each as long as its factor. Marks at distance 1, the first one at a
    random place, hit each image floor or ceil of its factor times.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, REPEATS])).random_raw(len(factors) + 1)
    order = np.argsort(bits[1:], kind="stable")
    marks = -(-(np.cumsum(factors[order]) - int(bits[0] % np.uint64(ONE))) // ONE)  # that lie before each end
    counts = np.empty_like(marks)
    counts[order] = np.diff(marks, prepend=0)
    samples = np.repeat(np.arange(len(factors)), counts)
    return Epoch(samples, np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts))


def read_factors(data: DataConfig) -> Ints:
    """The factors of `data.train`, whose records are all read. Raises ShardError."""
    source = DetectionDataset(data.train, data.labels)  # without a cache, which would download the images as well

    def classes(i: int) -> frozenset[int]:
        return frozenset(source.read_targets(i)[1].tolist())

    with ThreadPoolExecutor(REMOTE_READERS if source.reader.store.remote else 1) as pool:
        return repeat_factors(list(pool.map(classes, range(len(source)))), data.balance)
