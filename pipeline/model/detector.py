"""What every detector is to the engine, to evaluation and to prediction; `build_model` returns one.

`postprocess` understands all outputs, `build_criterion` makes what they are trained with.
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

    takes_targets = False  # whether `forward` needs the ground truth in training, because it samples from it

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
        """What the layers shall count of a batch, float32 [N, 1, H, W]; None where they take it as it is.

        That is without `model.norm_valid`, and in evaluation on the CPU where nothing is padded: the result is the same
        and comes sooner. On a GPU the question would let the host wait.
        """
        ask = mask.device.type == "cpu" and not (self.training or torch.compiler.is_compiling())
        if not self.config.norm_valid or (ask and not mask.any()):
            return None
        return valid_pixels(mask)

    def pad_to_stride(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Batches of thin pictures: a side below the deepest stride, where no feature would be left, is padded to it.

        Args and returns: as `images` and `mask` of `forward`.
        """
        height, width = images.shape[-2:]
        if min(height, width) >= self.stride:
            return images, mask
        edges = (0, max(0, self.stride - width), 0, max(0, self.stride - height))
        return pad(images, edges), pad(mask, edges, value=True)
