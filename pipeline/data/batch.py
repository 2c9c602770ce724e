"""`Batch`, one pad group as tensors: the loader yields it, the engine and the evaluator consume it.

Images stay uint8 until they are on the device: a quarter of the bytes to move between processes and to the GPU. The
targets of all images are packed into a few arrays, because every array that is passed between processes has a cost.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of values in [0, 1]
STD = (0.229, 0.224, 0.225)
Pixels = Image.Image | NDArray[np.uint8]  # RGB; an array has [3, h, w]
Size = tuple[int, int]  # (h, w)
ON_DEVICE = ("images", "mask", "boxes_cxcywh", "labels")  # read by the model and its losses


@dataclass(frozen=True, eq=False)
class Batch:
    """B images padded to a common size at the right and the bottom, and their T boxes, concatenated."""

    images: Tensor  # uint8 [B, 3, H, W], zero in the padding; after `to`: float32, normalised, zero in the padding
    mask: Tensor  # bool [B, H, W], True = padding
    boxes_cxcywh: Tensor  # float32 [T, 4], relative to each image without its padding
    labels: Tensor  # int64 [T]
    target_offsets: Tensor  # int64 [B + 1]; image b has the targets target_offsets[b] : target_offsets[b + 1]
    image_ids: Tensor  # int64 [B]
    sizes: Tensor  # int64 [B, 2], (h, w) of the original images
    group: int  # number of the pad group within its step
    weight: float  # 1.0, or 0.0 for a repeat that stands in for a missing group

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        """Per image `{"labels": [n], "boxes": [n, 4] cxcywh}`, in the criterion's form; views, no copies."""
        spans = itertools.pairwise(self.target_offsets.tolist())
        return [{"labels": self.labels[a:b], "boxes": self.boxes_cxcywh[a:b]} for a, b in spans]

    def to(self, device: torch.device) -> Self:
        """The batch on `device` with float32 images: ImageNet mean and deviation, exactly 0 in the padding."""
        moved = self.copy_to(device)
        if moved.images.dtype != torch.uint8:
            return moved
        # Created on the host and copied asynchronously: with torch.tensor(..., device=) the host waits for the GPU.
        mean, std = (torch.tensor(value).view(3, 1, 1).to(device, non_blocking=True) for value in (MEAN, STD))
        images = moved.images.float().div_(255).sub_(mean).div_(std)
        return dataclasses.replace(moved, images=images.masked_fill_(moved.mask[:, None], 0.0))

    def copy_to(self, device: torch.device) -> Self:
        """Copy the batch to `device` without normalising it; from pinned memory the copy is asynchronous.

        `target_offsets`, `image_ids` and `sizes` stay on the host, which reads them.
        """
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ON_DEVICE}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Self:
        """Copy the batch to pinned (page-locked) host memory, from which a GPU copies asynchronously."""
        return dataclasses.replace(self, **{name: getattr(self, name).pin_memory() for name in ON_DEVICE})


@dataclass(frozen=True)
class Item:
    """One augmented image, ready to be padded."""

    image: Pixels
    boxes_xyxy: NDArray[np.float32]  # [n, 4] pixels of this image
    labels: NDArray[np.int64]  # [n]
    image_id: int
    size: Size  # of the original

    @property
    def extent(self) -> Size:
        """(h, w) of the augmented image."""
        if isinstance(self.image, Image.Image):
            return self.image.height, self.image.width
        return self.image.shape[1], self.image.shape[2]


@dataclass(frozen=True, eq=False)
class Packed:
    """A pad group without its pixels, as arrays: they are pickled by value, tensors would be sent by descriptor."""

    shape: tuple[int, int, int, int]  # [B, 3, H, W] of the padded images
    extents: NDArray[np.int64]  # [B, 2] (h, w) of the images within the padded ones
    boxes_cxcywh: NDArray[np.float32]  # [T, 4]
    labels: NDArray[np.int64]  # [T]
    target_offsets: NDArray[np.int64]  # [B + 1]
    image_ids: NDArray[np.int64]  # [B]
    sizes: NDArray[np.int64]  # [B, 2]
    group: int
    weight: float

    def batch(self, images: Tensor) -> Batch:
        """The batch, with the padded `images` of `shape`."""
        mask = np.zeros((self.shape[0], *self.shape[2:]), np.bool_)
        for row, (height, width) in zip(mask, self.extents.tolist(), strict=True):
            row[height:] = True
            row[:height, width:] = True
        names = ("boxes_cxcywh", "labels", "target_offsets", "image_ids", "sizes")
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in names}
        return Batch(images, torch.from_numpy(mask), **arrays, group=self.group, weight=self.weight)


def collate(items: Sequence[Item], group: int, weight: float) -> Batch:
    """Pad the items to the group's largest height and width and pack their targets."""
    shape = padded_shape([item.extent for item in items])
    images = np.empty(shape, np.uint8)
    return pack(items, images, group, weight).batch(torch.from_numpy(images))


def padded_shape(extents: Sequence[Size], multiple: int = 1) -> tuple[int, int, int, int]:
    """The shape [B, 3, H, W] that images of these (h, w) are padded to; H and W are multiples of `multiple`."""
    height, width = (max(sides) for sides in zip(*extents, strict=True))
    return len(extents), 3, -(-height // multiple) * multiple, -(-width // multiple) * multiple


def pack(items: Iterable[Item], images: NDArray[np.uint8], group: int, weight: float) -> Packed:
    """Write the items' pixels into `images` [B, 3, H, W], padded with zeros, and pack the rest.

    Each image is written as soon as `items` yields it, while it is in the processor's cache. It is freed before the
    next one is made, so that the next one reuses its memory.
    """
    extents, boxes, labels, image_ids, sizes = [], [], [], [], []
    made = iter(items)
    for row in images:
        item = next(made)
        _paste(item, row)
        extents.append(item.extent)
        boxes.append(_relative_cxcywh(item))
        labels.append(item.labels)
        image_ids.append(item.image_id)
        sizes.append(item.size)
        del item
    return Packed(
        shape=(len(images), 3, images.shape[2], images.shape[3]),
        extents=np.array(extents, np.int64),
        boxes_cxcywh=np.concatenate(boxes),
        labels=np.concatenate(labels),
        target_offsets=np.cumsum([0, *map(len, labels)], dtype=np.int64),
        image_ids=np.array(image_ids, np.int64),
        sizes=np.array(sizes, np.int64),
        group=group,
        weight=weight,
    )


def _paste(item: Item, row: NDArray[np.uint8]) -> None:
    height, width = item.extent
    # Pillow's bands one by one are 6 times faster than [h, w, 3] and a transpose.
    bands = item.image.split() if isinstance(item.image, Image.Image) else item.image
    for channel, band in enumerate(bands):
        row[channel, :height, :width] = np.asarray(band)
    row[:, height:] = 0
    row[:, :height, width:] = 0


def _relative_cxcywh(item: Item) -> NDArray[np.float32]:
    low, high = item.boxes_xyxy[:, :2], item.boxes_xyxy[:, 2:]
    height, width = item.extent
    extent = np.array([width, height] * 2, np.float32)
    return (np.concatenate([(low + high) / 2, high - low], axis=1) / extent).astype(np.float32, copy=False)
