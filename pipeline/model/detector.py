"""What every detector is to the engine, to evaluation and to prediction; `build_model` returns one.

`postprocess` understands all outputs, `build_criterion` makes what they are trained with.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError


class Detector(nn.Module, ABC):
    """Base of the detectors.

    Outputs of `forward` are one of: `pred_logits` and `pred_boxes` of set prediction (with `softmax: True` if the last
    logit is "no object"); or of a baseline `losses`, in training, and else `detections`.
    """

    takes_targets = False  # whether `forward` needs the ground truth in training, because it samples from it

    def __init__(self, config: ModelConfig, stride: int) -> None:
        super().__init__()
        self.config = config
        self.stride = stride  # pixels; no side of an image may be smaller

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

    def check_size(self, images: Tensor, or_else: str = "") -> None:
        """Refuse images [N, 3, H, W] smaller than the deepest stride; `or_else` is one more thing to do about it."""
        height, width = images.shape[-2:]
        if min(height, width) < self.stride:
            raise ConfigError(
                f"images of {height}x{width} px are smaller than the model's deepest stride, {self.stride}; raise "
                f"data.augment.scales and data.augment.eval_size{or_else}"
            )
