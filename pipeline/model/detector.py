"""The interface of all detectors; `build_model` returns one.

`postprocess` accepts the outputs of all detectors, and `build_criterion` makes their criterion.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.config import ModelConfig
from pipeline.model.backbones.norms import valid_pixels


class Detector(nn.Module, ABC):
    """Base of the detectors.

    Outputs of `forward` are one of: `pred_logits` and `pred_boxes` of set prediction (with `softmax: True` if the last
    logit is "no object"); or of a baseline `losses`, in training, and else `detections`.
    """

    # modules that run without autocast, by a part of their name
    float32_parts = ("class_embed", "bbox_embed", "reference_points", "conv_offset")
    takes_targets = False  # whether `forward` needs the ground truth in training, to sample from it

    def __init__(self, config: ModelConfig, stride: int) -> None:
        super().__init__()
        self.config = config
        self.stride = stride  # pixels; a smaller side of a batch is padded to it

    @abstractmethod
    def forward(
        self, images: Tensor, mask: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Detect.

        Args:
            images: [N, 3, H, W] normalised, zero in the padding.
            mask: bool [N, H, W], True = padding (right and bottom).
            targets: per image `labels` [n] and `boxes` cxcywh [n, 4]; only where `takes_targets`, in training.
        """

    def valid_pixels(self, mask: Tensor) -> Tensor | None:
        """The valid pixels that layers must count, float32 [N, 1, H, W]; None if they count all pixels.

        It is None without `model.norm_valid`, and in CPU evaluation if nothing is padded: the result is the same but
        faster. On a GPU this check would make the host wait.
        """
        check = mask.device.type == "cpu" and not (self.training or torch.compiler.is_compiling())
        if not self.config.norm_valid or (check and not mask.any()):
            return None
        return valid_pixels(mask)

    def pad_to_stride(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pad thin images: a side below the deepest stride, which would leave no feature, is padded to it.

        Args and returns: as `images` and `mask` of `forward`.
        """
        height, width = images.shape[-2:]
        if min(height, width) >= self.stride:
            return images, mask
        edges = (0, max(0, self.stride - width), 0, max(0, self.stride - height))
        return pad(images, edges), pad(mask, edges, value=True)
