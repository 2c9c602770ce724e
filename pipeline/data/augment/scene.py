"""The order of what is added to the published augmentation: mosaic, pasted objects, warp; colours come at the end.

A scene replaces a sample's image and boxes before its view is applied, and has the same size. It depends on its key
(seed, epoch, sample, copy), the settings and the shards. The other images of a mosaic, and the one that objects are
cut from, come from the sample's own shard, so an epoch reads no shard that its plan does not name. Faults of the data
are ShardErrors.
"""

from dataclasses import replace
from enum import IntEnum

import numpy as np
from PIL import Image

from pipeline.config.augment import Extras
from pipeline.data.augment.colours import change_colours
from pipeline.data.augment.compose import LabelledImage, Tile, draw_tiles, make_mosaic, paste_objects
from pipeline.data.augment.draws import Draws
from pipeline.data.augment.warp import clip_boxes, draw_affine, warp_boxes, warp_image
from pipeline.data.batch import Item
from pipeline.data.dataset import DetectionDataset, Sample

Key = tuple[int, int, int, int]  # seed, epoch, position of the sample in the index, copy (0 without data.balance)


class Stream(IntEnum):
    """Separates the random numbers of a sample, so that one augmentation does not change the draws of another."""

    MOSAIC = 1
    PASTE = 2
    AFFINE = 3
    COLOURS = 4


def make_scene(source: DetectionDataset, i: int, extras: Extras, key: Key) -> Sample:
    """Sample i as `DetectionDataset.sample` gives it, or the scene that is drawn for it.

    Raises:
        ShardError: a damaged shard or image.
    """
    sample = source.sample(i)
    labelled = LabelledImage(sample.image, sample.boxes_xyxy, sample.labels)
    draws = Draws(*key, Stream.MOSAIC)
    if draws.happens(extras.mosaic) and (tiles := draw_tiles(sample.size, draws)):
        others = [_decode(source, neighbour(source, i, draws), tile) for tile in tiles[1:]]
        labelled = make_mosaic(sample.size, tiles, [labelled, *others], extras.min_visible)
    draws = Draws(*key, Stream.PASTE)
    if draws.happens(extras.copy_paste):
        other = source.sample(neighbour(source, i, draws))
        cut = LabelledImage(other.image, other.boxes_xyxy, other.labels)
        labelled = paste_objects(labelled, cut, extras, draws)
    draws = Draws(*key, Stream.AFFINE)
    if draws.happens(extras.affine):
        affine = draw_affine(sample.size, extras, draws)
        boxes = warp_boxes(labelled.boxes_xyxy, affine, sample.size)
        boxes, labels = clip_boxes(boxes, labelled.labels, sample.size, extras.min_visible)
        labelled = LabelledImage(warp_image(labelled.image, affine), boxes, labels)
    return replace(sample, image=labelled.image, boxes_xyxy=labelled.boxes_xyxy, labels=labelled.labels)


def colour_item(item: Item, extras: Extras, key: Key) -> Item:
    """The item with its colours changed as drawn."""
    image = item.image
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    return replace(item, image=change_colours(image, extras, Draws(*key, Stream.COLOURS)))


def neighbour(source: DetectionDataset, i: int, draws: Draws) -> int:
    """A drawn sample of the shard of sample i, which may be i itself."""
    shards = source.index.samples.shard
    of_shard = np.flatnonzero(shards == shards[i])
    return int(of_shard[draws.below(len(of_shard))])


def _decode(source: DetectionDataset, i: int, tile: Tile) -> LabelledImage:
    """Sample i, decoded no larger than its tile needs."""
    height, width = source.size(i)
    scale = tile.scale((height, width))
    sample = source.sample(i, at_least=(int(np.ceil(height * scale)), int(np.ceil(width * scale))))
    return LabelledImage(sample.image, sample.boxes_xyxy / np.float32(sample.shrink), sample.labels)
