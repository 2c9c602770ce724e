"""`Batch`, one pad group as tensors: what the loader yields, the engine and the evaluator consume.

Pictures stay uint8 until they are on the device (a quarter of the bytes to move between processes and to the GPU), and
the targets of all images are packed into a few tensors, because each tensor handed between processes has its own cost.
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
        """The batch on `device` with float32 images: ImageNet mean and deviation, exactly 0 in the padding.

        `target_offsets`, `image_ids` and `sizes` stay on the host, where they are read.
        """
        mask = self.mask.to(device, non_blocking=True)
        images = self.images
        if images.dtype == torch.uint8:
            mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
            std = torch.tensor(STD, device=device).view(3, 1, 1)
            images = images.to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
            images.masked_fill_(mask[:, None], 0.0)
        return dataclasses.replace(
            self,
            images=images.to(device),
            mask=mask,
            boxes_cxcywh=self.boxes_cxcywh.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Item:
    """One augmented image, ready to be padded."""

    image: Image.Image  # RGB
    boxes_xyxy: NDArray[np.float32]  # [n, 4] pixels of this image
    labels: NDArray[np.int64]  # [n]
    image_id: int
    size: tuple[int, int]  # (h, w) of the original


def collate(items: Sequence[Item], group: int, weight: float) -> Batch:
    """Pad the items to the group's largest height and width and pack their targets."""
    height, width = max(i.image.height for i in items), max(i.image.width for i in items)
    images = np.zeros((len(items), 3, height, width), np.uint8)
    mask = np.ones((len(items), height, width), np.bool_)
    for row, item in enumerate(items):
        for channel, band in enumerate(item.image.split()):  # 6 times faster than [h, w, 3] and a transpose
            images[row, channel, : item.image.height, : item.image.width] = np.asarray(band)
        mask[row, : item.image.height, : item.image.width] = False
    return Batch(
        images=torch.from_numpy(images),
        mask=torch.from_numpy(mask),
        boxes_cxcywh=torch.from_numpy(np.concatenate([_relative_cxcywh(item) for item in items])),
        labels=torch.from_numpy(np.concatenate([item.labels for item in items])),
        target_offsets=torch.tensor(np.cumsum([0, *(len(item.labels) for item in items)])),
        image_ids=torch.tensor([item.image_id for item in items]),
        sizes=torch.tensor([item.size for item in items]),
        group=group,
        weight=weight,
    )


def _relative_cxcywh(item: Item) -> NDArray[np.float32]:
    low, high = item.boxes_xyxy[:, :2], item.boxes_xyxy[:, 2:]
    extent = np.array([item.image.width, item.image.height] * 2, np.float32)
    return (np.concatenate([(low + high) / 2, high - low], axis=1) / extent).astype(np.float32, copy=False)
