"""The backbone that all rows start from: trained to name the shape in a crop, as the papers' is on ImageNet.

Without it DETR stayed below an AP of 0.5% in all trainings that were tried (docs/findings.md). On one thread of a CPU
the weights have the same bits at every call of one machine.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pipeline.config import BackboneConfig
from pipeline.data.batch import MEAN, STD
from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic
from pipeline.files.atomic import replace_file
from pipeline.model.backbones.build import build_backbone

SIDE = 64  # of a crop
CONTEXT = 1.5  # sides of the object that a crop shows
SEED = 2  # of the drawn images; the detectors' data have 0 and 1


@dataclass(frozen=True)
class Pretraining:
    """What the backbone has seen."""

    images: int  # drawn; their objects become the crops
    side: int  # of the images, mean
    epochs: int  # over the crops

    @property
    def digest(self) -> str:
        """Of the recipe: the weights of two machines differ in their last bits, which makes no other experiment."""
        return hashlib.sha256(json.dumps([*asdict(self).items(), SIDE, CONTEXT, SEED]).encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        """Name of the weights."""
        return f"backbone-{self.digest}.pth"


def pretrain_backbone(config: BackboneConfig, recipe: Pretraining, folder: Path) -> str:
    """Train the backbone where its file is missing; returns the digest of the recipe.

    Args:
        config: the `model.backbone` section that the detectors have.
        recipe: how.
        folder: for the drawn images and the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / recipe.file
    with (folder / "pretraining.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second call waits; the kernel ends the lock with its process
        if not path.exists():
            weights = _train(config, *_crops(folder / "raw" / "pretraining", recipe), recipe.epochs)
            with replace_file(path) as temporary:
                torch.save(weights, temporary)
    return recipe.digest


def _crops(folder: Path, recipe: Pretraining) -> tuple[Tensor, Tensor]:
    """Normalised crops [N, 3, SIDE, SIDE] of all objects that are no crowd, and their classes [N]."""
    annotations, files = write_synthetic(folder, images=recipe.images, seed=SEED, size=recipe.side)
    tree = json.loads(annotations.read_bytes())
    names = {image["id"]: image["file_name"] for image in tree["images"]}
    classes = {category: number for number, category in enumerate(CATEGORIES)}
    found = [each for each in tree["annotations"] if not each["iscrowd"]]
    crops = np.stack([_crop(files / names[each["image_id"]], each["bbox"]) for each in found])
    scaled = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    normal = (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return normal, torch.tensor([classes[each["category_id"]] for each in found])


def _crop(path: Path, bbox_xywh: list[float]) -> NDArray[np.uint8]:
    """The square around an object, black beyond the image."""
    x, y, w, h = bbox_xywh
    half = CONTEXT * max(w, h) / 2
    box = (round(x + w / 2 - half), round(y + h / 2 - half), round(x + w / 2 + half), round(y + h / 2 + half))
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _train(config: BackboneConfig, images: Tensor, classes: Tensor, epochs: int, batch: int = 32) -> dict[str, Tensor]:
    """AdamW on the cross-entropy of the mean of the last map; its rate falls to 0 along a cosine."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    backbone = build_backbone(config, load=False)
    head = nn.Linear(backbone.channels[-1], len(CATEGORIES))
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3, weight_decay=1e-4)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for rows in _batches(len(images), batch, epochs):
        scores = head(backbone(images[rows])[-1].mean((2, 3)))
        loss = nn.functional.cross_entropy(scores, classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return backbone.state_dict()


def _batches(count: int, batch: int, epochs: int) -> Iterator[Tensor]:
    """Row numbers in a new order for each epoch; the rest that fills no batch is left out."""
    for _ in range(epochs):
        yield from torch.randperm(count)[: count // batch * batch].view(-1, batch)
