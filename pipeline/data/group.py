"""One pad group: which samples it holds, in which view each, and how its pixels and targets are made.

A pure function of the request and the shards, in any process. Faults of the data are ShardErrors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import Item, Packed, pack, padded_shape
from pipeline.data.dataset import DetectionDataset
from pipeline.data.resample import apply_fused, decoded_size
from pipeline.data.transforms import View, apply


@dataclass(frozen=True)
class Request:
    """One pad group to make: all that a worker needs to know."""

    source: int  # number that `WorkerPool.add` gave the data set
    samples: tuple[int, ...]  # positions in its index
    views: tuple[View, ...]
    fused: bool  # see `resample`
    group: int
    weight: float
    multiple: int = 1  # of the padded sides, see `data.pad_multiple`

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, 3, H, W] of the padded images."""
        return padded_shape([view.out_size for view in self.views], self.multiple)


def make_group(request: Request, sources: Sequence[DetectionDataset], images: NDArray[np.uint8]) -> Packed:
    """Write the pixels of a group into `images` of `request.shape`, whatever they contain; returns the rest of it.

    Raises:
        ShardError: a damaged shard or image.
    """
    one = _fused if request.fused else _reference
    source = sources[request.source]
    items = (one(source, i, view) for i, view in zip(request.samples, request.views, strict=True))
    return pack(items, images, request.group, request.weight)


def _reference(source: DetectionDataset, i: int, view: View) -> Item:
    sample = source.sample(i)
    image, boxes, labels = apply(sample.image, sample.boxes_xyxy, sample.labels, view)
    return Item(image, boxes, labels, sample.image_id, sample.size)


def _fused(source: DetectionDataset, i: int, view: View) -> Item:
    size = source.size(i)
    sample = source.sample(i, at_least=decoded_size(view, size))
    image, boxes, labels = apply_fused(sample.image, sample.shrink, sample.boxes_xyxy, sample.labels, view, size)
    return Item(image, boxes, labels, sample.image_id, size)
