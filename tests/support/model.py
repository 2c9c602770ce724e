"""Small detectors and random batches for the tests of the model."""

from typing import Any

import torch
from torch import Tensor

from pipeline.config import ModelConfig

SMALL = {
    "num_classes": 5,
    "hidden_dim": 32,
    "heads": 4,
    "enc_layers": 2,
    "dec_layers": 3,
    "ffn_dim": 48,
    "dropout": 0.0,
    "queries": 12,
    "levels": 3,
    "enc_points": 2,
    "dec_points": 2,
}
VARIANTS = {"one_stage": {}, "refine": {"refine": True}, "two_stage": {"refine": True, "two_stage": True}}


def small_config(**changes: Any) -> ModelConfig:
    """A detector of some 10^5 parameters over Conv5."""
    backbone = {"name": "conv5", "weights": "none", "norm": "group", "width": 8}
    return ModelConfig.model_validate({**SMALL, "backbone": backbone, **changes})


def small_detr(**changes: Any) -> ModelConfig:
    """A DETR of the same size: softmax head, one level."""
    sizes = {key: value for key, value in SMALL.items() if key not in ("levels", "enc_points", "dec_points")}
    backbone = {"name": "conv5", "weights": "none", "norm": "group", "width": 8}
    return ModelConfig.model_validate(
        {**sizes, "name": "detr", "class_head": "softmax", "backbone": backbone, **changes}
    )


def padded_images(*sizes: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images (height, width), padded right and bottom to a batch, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    images, mask = torch.zeros(len(sizes), 3, height, width), torch.ones(len(sizes), height, width, dtype=torch.bool)
    for image, padding, (h, w) in zip(images, mask, sizes, strict=True):
        image[:, :h, :w] = torch.randn(3, h, w, generator=generator)
        padding[:h, :w] = False
    return images, mask


def random_targets(*counts: int, classes: int = 5, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random objects, `counts[i]` in image i."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "labels": torch.randint(classes, (n,), generator=generator),
            "boxes": 0.1 + 0.5 * torch.rand(n, 4, generator=generator),
        }
        for n in counts
    ]


def random_outputs(
    images: int, queries: int, classes: int = 5, layers: int = 3, enc: int = 0, seed: int = 1
) -> dict[str, Any]:
    """What a detector returns, as leaves that take gradients; `enc` tokens of encoder predictions."""
    generator = torch.Generator().manual_seed(seed)

    def layer(count: int) -> dict[str, Tensor]:
        logits = torch.randn(images, count, classes, generator=generator) * 2
        boxes = 0.05 + 0.6 * torch.rand(images, count, 4, generator=generator)
        return {"pred_logits": logits.requires_grad_(), "pred_boxes": boxes.requires_grad_()}

    outputs: dict[str, Any] = {**layer(queries), "aux_outputs": [layer(queries) for _ in range(layers - 1)]}
    if enc:
        outputs["enc_outputs"] = layer(enc)
    return outputs
