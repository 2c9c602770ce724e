"""The alternatives that `benchmarks.data` compares the loader with: a bare loop over image files, and CocoDetection.

Both read the same images as the loader, written out of its shards.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import CocoDetection
from torchvision.transforms import functional

from pipeline.config import AugmentConfig
from pipeline.data.batch import MEAN, STD
from pipeline.data.dataset import DetectionDataset
from pipeline.data.images import decode, decode_at_least
from pipeline.data.records import usable_boxes
from pipeline.data.resample import apply_fused, decoded_size
from pipeline.data.sharding.shards import build_shards
from pipeline.data.transforms import View, apply, draw_views

CHUNK_IMAGES = 16  # images that a bare loop processes between two messages to its parent


@dataclass(frozen=True)
class Copy:
    """SHARDS `repeat` times over, as images with an annotation file and as shards."""

    images: Path
    annotations: Path
    shards: Path

    @property
    def paths(self) -> list[Path]:
        """The image files by position in the index."""
        return sorted(self.images.iterdir())


def copy_out(source: DetectionDataset, folder: Path, repeat: int) -> Copy:
    """Write the copy; further copies of an image are links."""
    made = Copy(folder / "images", folder / "instances.json", folder / "shards")
    made.images.mkdir()
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    tree["categories"] = [{"id": category.id, "name": category.name} for category in source.index.categories]
    for i in range(len(source)):
        record, kind = source.read_annotations(i), "png" if source.index.samples.png[i] else "jpg"
        for turn in range(repeat):
            image_id = turn * len(source) + i
            path = made.images / f"{image_id:012d}.{kind}"
            if turn:
                os.link(made.images / f"{i:012d}.{kind}", path)
            else:
                path.write_bytes(source.read_image(i))
            size = {"width": record["width"], "height": record["height"]}
            tree["images"].append({"id": image_id, "file_name": path.name, **size})
            for annotation in record["annotations"]:
                number = len(tree["annotations"]) + 1
                tree["annotations"].append({**annotation, "id": number, "image_id": image_id})
    made.annotations.write_text(json.dumps(tree), encoding="utf-8")
    build_shards(made.annotations, made.images, made.shards, samples_per_shard=512)
    return made


class Bare:
    """Opens, decodes and augments chunks of images until their pixels are arrays; returns only a number."""

    def __init__(self, copy: Copy, data: DetectionDataset, augment: AugmentConfig) -> None:
        self._paths = copy.paths
        self._fused = augment.resample == "fused"
        self._targets = [(s.boxes_xyxy, s.labels, s.size) for s in map(data.sample, range(len(data)))]
        drawn = draw_views(data.index.sizes(), 0, 0, augment)
        self._views = [drawn[i] for i in range(len(drawn))]

    def __len__(self) -> int:
        return -(-len(self._paths) // CHUNK_IMAGES)

    def __getitem__(self, chunk: int) -> int:
        for i in self.numbers(chunk):
            (boxes, labels, size), view = self._targets[i], self._views[i]
            content = self._paths[i].read_bytes()
            if self._fused:
                image, shrink = decode_at_least(content, size, decoded_size(view, size))
                apply_fused(image, shrink, boxes, labels, view, size)
            else:
                np.asarray(apply(decode(content, size), boxes, labels, view)[0])
        return len(self.numbers(chunk))

    def numbers(self, chunk: int) -> range:
        """The positions of a chunk's images."""
        return range(chunk * CHUNK_IMAGES, min((chunk + 1) * CHUNK_IMAGES, len(self._paths)))


class Coco(CocoDetection):
    """CocoDetection with the published augmentation; pixels as published (float, normalised), or left in uint8."""

    def __init__(self, copy: Copy, views: list[View], as_float: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(str(copy.images), str(copy.annotations))
        self._views, self._as_float = views, as_float

    def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, annotations = super().__getitem__(i)
        boxes, categories = usable_boxes(annotations, (image.height, image.width))
        image, boxes, labels = apply(image, boxes, np.array(categories, np.int64), self._views[i])
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        if self._as_float:
            return functional.normalize(functional.to_tensor(image), MEAN, STD), target
        return functional.pil_to_tensor(image), target


class Loaded:
    """A DataLoader of torch."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def run(self, epoch: int) -> Iterator[int]:
        """Bare loops count their images, batches have a first tensor."""
        torch.manual_seed(epoch)
        return (made if isinstance(made, int) else len(made[0]) for made in self.loader)

    def processes(self) -> list[int]:
        """The DataLoader's workers."""
        return [worker.pid for worker in self.loader._iterator._workers]


def options(workers: int) -> dict[str, Any]:
    """How a peer's DataLoader gets its processes: as ours does."""
    return {"num_workers": workers, "persistent_workers": True, "multiprocessing_context": "forkserver"}


def pad(samples: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Images padded to the largest, their mask, the targets; as published."""
    height, width = (max(image.shape[side] for image, _ in samples) for side in (1, 2))
    images = samples[0][0].new_zeros(len(samples), 3, height, width)
    mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for row, (image, _) in enumerate(samples):
        images[row, :, : image.shape[1], : image.shape[2]].copy_(image)
        mask[row, : image.shape[1], : image.shape[2]] = False
    return images, mask, [target for _, target in samples]
