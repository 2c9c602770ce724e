"""One pad group: which samples it holds, in which view each, and how its pixels and targets are made.

A pure function of the request and the shards, in any process. Faults of the data are ShardErrors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config.augment import Extras
from pipeline.data.augment.scene import Key, colour_item, make_scene
from pipeline.data.batch import Item, Packed, pack, padded_shape
from pipeline.data.dataset import DetectionDataset, Sample, Size
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
    extras: Extras | None = None  # what is added to the published augmentation; None: nothing
    keys: tuple[Key, ...] = ()  # of each sample's random numbers; only with `extras`

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, 3, H, W] of the padded images."""
        return padded_shape([view.out_size for view in self.views], self.multiple)


def make_group(request: Request, sources: Sequence[DetectionDataset], images: NDArray[np.uint8]) -> Packed:
    """Write the pixels of a group into `images` of `request.shape`, whatever they contain; returns the rest of it.

    Raises:
        ShardError: a damaged shard or image.
    """
    make = _make_fused if request.fused else _make_reference
    source = sources[request.source]
    items = (make(source, request, place) for place in range(len(request.samples)))
    return pack(items, images, request.group, request.weight)


def _make_reference(source: DetectionDataset, request: Request, place: int) -> Item:
    sample, view = _read(source, request, place, None), request.views[place]
    image, boxes, labels = apply(sample.image, sample.boxes_xyxy, sample.labels, view)
    return _finish(Item(image, boxes, labels, sample.image_id, sample.size), request, place)


def _make_fused(source: DetectionDataset, request: Request, place: int) -> Item:
    view, size = request.views[place], source.size(request.samples[place])
    sample = _read(source, request, place, decoded_size(view, size))
    image, boxes, labels = apply_fused(sample.image, sample.shrink, sample.boxes_xyxy, sample.labels, view, size)
    return _finish(Item(image, boxes, labels, sample.image_id, size), request, place)


def _read(source: DetectionDataset, request: Request, place: int, at_least: Size | None) -> Sample:
    if request.extras is None or not request.extras.scenes:
        i = request.samples[place]
        return source.sample(i) if at_least is None else source.sample(i, at_least)
    return make_scene(source, request.samples[place], request.extras, request.keys[place])


def _finish(item: Item, request: Request, place: int) -> Item:
    if request.extras is None or not request.extras.colours:
        return item
    return colour_item(item, request.extras, request.keys[place])
