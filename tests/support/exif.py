"""Scenes with one block, stored in any EXIF orientation, and what a loader sees under their boxes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.data.images import turn_upright
from pipeline.data.loader import EvalLoader, TrainLoader
from support.data import with_orientation

BLOCK, GROUND = (20, 30, 120), (200, 205, 190)
SMALL = AugmentConfig(scales=(64,), max_size=120, crop=0.0, eval_size=64)  # a crop could lose the block


def write_scenes(
    out: Path, orientations: Sequence[int], boxes: str, size: tuple[int, int] = (64, 96), kind: str = "JPEG"
) -> tuple[Path, Path]:
    """COCO annotations and images of displayed `size` (h, w); `boxes` and sizes are "displayed" or "stored"."""
    folder = out / "images"
    folder.mkdir(parents=True)
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "block"}]}
    for number, orientation in enumerate(orientations, start=1):
        displayed = Image.new("RGB", (size[1], size[0]), GROUND)
        left, top = 3 + number, 2 + number
        ImageDraw.Draw(displayed).rectangle([left, top, left + 29, top + 17], fill=BLOCK)
        stored = turn_upright(displayed, {6: 8, 8: 6}.get(orientation, orientation))
        name = f"{number}.{'jpg' if kind == 'JPEG' else 'png'}"
        (folder / name).write_bytes(with_orientation(stored, orientation, kind))
        seen = displayed if boxes == "displayed" else stored
        x0, y0, x1, y1 = block_of(np.asarray(seen)).tolist()
        box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": 540, "iscrowd": 0}
        tree["images"].append({"id": number, "file_name": name, "width": seen.width, "height": seen.height})
        tree["annotations"].append({"id": number, "image_id": number, "category_id": 1, **box})
    path = out / "instances.json"
    path.write_text(json.dumps(tree))
    return path, folder


def block_of(pixels: NDArray[Any]) -> NDArray[np.int64]:
    """The corners xyxy of the blue part of an RGB image [h, w, 3]."""
    rows, columns = np.nonzero(pixels[..., 2].astype(int) - pixels[..., 0] > 40)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def off_by(folder: Path | str, resample: str = "fused", epochs: int = 2) -> float:
    """How many pixels the boxes of shards lie beside their blocks at most, in training and evaluation."""
    data = DataConfig(
        train=str(folder), val=str(folder), workers=0, augment=SMALL.model_copy(update={"resample": resample})
    )
    train = TrainConfig(global_batch=1, micro_batch=1)
    loader = TrainLoader(data, train, 0, 0, 1)
    batches = [batch for epoch in range(epochs) for step in loader.epoch(epoch) for batch in step]
    batches += list(EvalLoader(data, 1, 0, 1))
    worst = 0.0
    for batch in batches:
        height, width = (int(side) for side in (~batch.mask[0]).nonzero().max(dim=0).values + 1)
        cx, cy, w, h = batch.boxes_cxcywh[0].tolist()
        box = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * [width, height, width, height]
        found = block_of(batch.images[0].permute(1, 2, 0).numpy()[:height, :width])
        worst = max(worst, float(np.abs(found - box).max()))
    return worst
