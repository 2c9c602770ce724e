"""Fixed checkpoint, images and targets that belong to `assets/golden/`.

The numbers there come from the authors' code run in float32 on a CPU, without dropout, on exactly these tensors:
per variant the checkpoint's keys, shapes and aliases, losses, gradient norms, top detections (json), and the raw
outputs (npz). Every tensor is a function of its name, so none had to be stored.
"""

import json
import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.paths import ASSETS

FOLDER = ASSETS / "golden"
ORIGINAL_SIZES = torch.tensor([[480.0, 640.0], [427.0, 640.0]])  # (height, width) for the post-processing
TARGETS = [
    {
        "labels": torch.tensor([1, 17, 90]),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.2, 0.3, 0.1, 0.2], [0.7, 0.6, 0.3, 0.3]]),
    },
    {"labels": torch.tensor([44]), "boxes": torch.tensor([[0.4, 0.4, 0.5, 0.5]])},
]
_IMAGE_SIZES = ((224, 288), (192, 320))


def load(variant: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The recorded numbers and arrays of `ms`, `refine`, `two_stage` or `detr`."""
    with np.load(FOLDER / f"{variant}.npz") as arrays:
        return json.loads((FOLDER / f"{variant}.json").read_text()), dict(arrays)


def checkpoint(meta: dict[str, Any]) -> dict[str, Tensor]:
    """The published checkpoint; an alias holds the value of the key that owns it."""
    return {key: _tensor(meta["alias"].get(key, key), tuple(shape)) for key, shape in meta["keys"].items()}


def batch() -> tuple[Tensor, Tensor]:
    """Two noise images padded to [2, 3, 224, 320], and their mask (True = padding)."""
    draw = np.random.Generator(np.random.PCG64(7))
    images, mask = torch.zeros(2, 3, 224, 320), torch.ones(2, 224, 320, dtype=torch.bool)
    for index, (height, width) in enumerate(_IMAGE_SIZES):
        images[index, :, :height, :width] = torch.from_numpy(draw.standard_normal((3, height, width))).float()
        mask[index, :height, :width] = False
    return images, mask


def _tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """Gaussian noise seeded by the key's CRC32, scaled and shifted by the kind of tensor."""
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    weight = key.endswith("weight")
    batch_norm = ".bn" in key or "downsample.1" in key
    if key.endswith("running_var"):
        noise = np.abs(noise) + 0.5
    elif key.endswith("running_mean"):
        noise = 0.1 * noise
    elif batch_norm and weight:
        noise = 0.1 * noise + 0.6
    elif "norm" in key or batch_norm or ("input_proj" in key and ".1." in key):
        noise = 0.1 * noise + 1 if weight else 0.05 * noise
    elif "sampling_offsets" in key:
        noise = 0.05 * noise if weight else 2 * noise
    elif key.endswith("bias"):
        noise = 0.1 * noise
    elif len(shape) == 4:
        noise = 0.7 * math.sqrt(2 / math.prod(shape[1:])) * noise
    elif "query_embed" not in key and "level_embed" not in key:
        noise = noise / math.sqrt(shape[-1])
    return torch.from_numpy(np.ascontiguousarray(noise)).float()
