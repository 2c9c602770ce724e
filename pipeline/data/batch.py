"""`Batch`, one pad group as tensors: what the loader yields, the engine and the evaluator consume.

Pictures stay uint8 until they are on the device (a quarter of the bytes to move between processes and to the GPU), and
the targets of all images are packed into a few arrays, because each array handed between processes has its own cost.
"""

import dataclasses
import itertools
from collections.abc import Sequence
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
ON_DEVICE = ("images", "mask", "boxes_cxcywh", "labels")  # what a model and its losses read


@dataclass(frozen=True, eq=False)
class Batch:
    """B images padded to a common size at the right and the bottom, and their T boxes one after the other."""

    images: Tensor  # uint8 [B, 3, H, W], zero in the padding; after `to`: float32, normalised, zero in the padding
    mask: Tensor  # bool [B, H, W], True = padding
    boxes_cxcywh: Tensor  # float32 [T, 4], relative to each image without its padding
    labels: Tensor  # int64 [T]
    target_offsets: Tensor  # int64 [B + 1]; image b has the targets target_offsets[b] : target_offsets[b + 1]
    image_ids: Tensor  # int64 [B]
    sizes: Tensor  # int64 [B, 2], (h, w) of the original images
    group: int  # number of the pad group within its step
    weight: float  # 1.0, or 0.0 for a repeat that only keeps the ranks in step

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        """Per image `{"labels": [n], "boxes": [n, 4] cxcywh}`, as the criterion takes them; views, no copies."""
        spans = itertools.pairwise(self.target_offsets.tolist())
        return [{"labels": self.labels[a:b], "boxes": self.boxes_cxcywh[a:b]} for a, b in spans]

    def to(self, device: torch.device) -> Self:
        """The batch on `device` with float32 images: ImageNet mean and deviation, exactly 0 in the padding."""
        moved = self.copy_to(device)
        if moved.images.dtype != torch.uint8:
            return moved
        mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        std = torch.tensor(STD, device=device).view(3, 1, 1)
        images = moved.images.float().div_(255).sub_(mean).div_(std)
        return dataclasses.replace(moved, images=images.masked_fill_(moved.mask[:, None], 0.0))

    def copy_to(self, device: torch.device) -> Self:
        """The batch on `device` as it is; from pinned memory the copy runs beside the host.

        `target_offsets`, `image_ids` and `sizes` stay on the host, where they are read.
        """
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ON_DEVICE}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Self:
        """The batch in page-locked host memory, from which a GPU copies by itself."""
        return dataclasses.replace(self, **{name: getattr(self, name).pin_memory() for name in ON_DEVICE})


@dataclass(frozen=True)
class Item:
    """One augmented image, ready to be padded."""

    image: Pixels
    boxes_xyxy: NDArray[np.float32]  # [n, 4] pixels of this image
    labels: NDArray[np.int64]  # [n]
    image_id: int
    size: tuple[int, int]  # (h, w) of the original

    @property
    def extent(self) -> tuple[int, int]:
        """(h, w) of the image as it is."""
        if isinstance(self.image, Image.Image):
            return self.image.height, self.image.width
        return self.image.shape[1], self.image.shape[2]


@dataclass(frozen=True, eq=False)
class Packed:
    """A pad group without its pixels, as arrays: they pickle by value, where tensors would travel by descriptor."""

    extents: NDArray[np.int64]  # [B, 2] (h, w) of the images within the padded ones
    boxes_cxcywh: NDArray[np.float32]  # [T, 4]
    labels: NDArray[np.int64]  # [T]
    target_offsets: NDArray[np.int64]  # [B + 1]
    image_ids: NDArray[np.int64]  # [B]
    sizes: NDArray[np.int64]  # [B, 2]
    group: int
    weight: float

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, 3, H, W] of the padded images."""
        height, width = self.extents.max(axis=0).tolist()
        return len(self.extents), 3, height, width

    def batch(self, images: Tensor) -> Batch:
        """The batch, with the padded `images` of `shape`."""
        mask = np.ones((images.shape[0], *images.shape[2:]), np.bool_)
        for row, (height, width) in enumerate(self.extents.tolist()):
            mask[row, :height, :width] = False
        names = ("boxes_cxcywh", "labels", "target_offsets", "image_ids", "sizes")
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in names}
        return Batch(images, torch.from_numpy(mask), **arrays, group=self.group, weight=self.weight)


def pack(items: Sequence[Item], group: int, weight: float) -> Packed:
    """The items' targets and sizes."""
    return Packed(
        extents=np.array([item.extent for item in items], np.int64),
        boxes_cxcywh=np.concatenate([_relative_cxcywh(item) for item in items]),
        labels=np.concatenate([item.labels for item in items]),
        target_offsets=np.cumsum([0, *(len(item.labels) for item in items)], dtype=np.int64),
        image_ids=np.array([item.image_id for item in items], np.int64),
        sizes=np.array([item.size for item in items], np.int64),
        group=group,
        weight=weight,
    )


def paste(items: Sequence[Item], images: NDArray[np.uint8]) -> None:
    """Write the items' pixels into `images` [B, 3, H, W] of any content, with zeros at the right and the bottom."""
    for row, item in enumerate(items):
        height, width = item.extent
        # Pillow's bands one by one are 6 times faster than [h, w, 3] and a transpose.
        bands = item.image.split() if isinstance(item.image, Image.Image) else item.image
        for channel, band in enumerate(bands):
            images[row, channel, :height, :width] = np.asarray(band)
        images[row, :, height:] = 0
        images[row, :, :height, width:] = 0


def collate(items: Sequence[Item], group: int, weight: float) -> Batch:
    """Pad the items to the group's largest height and width and pack their targets."""
    packed = pack(items, group, weight)
    images = np.empty(packed.shape, np.uint8)
    paste(items, images)
    return packed.batch(torch.from_numpy(images))


def _relative_cxcywh(item: Item) -> NDArray[np.float32]:
    low, high = item.boxes_xyxy[:, :2], item.boxes_xyxy[:, 2:]
    height, width = item.extent
    extent = np.array([width, height] * 2, np.float32)
    return (np.concatenate([(low + high) / 2, high - low], axis=1) / extent).astype(np.float32, copy=False)
