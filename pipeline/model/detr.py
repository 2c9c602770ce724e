"""DETR: the deepest feature of the backbone, a dense transformer and shared heads; also DC5 and the focal DC5+.

DC5 is `model.backbone.dilation`; DC5+ is also `model.class_head: sigmoid` with 300 queries. Backbone settings that do
not fit together are a ConfigError.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.model.backbones.build import build_backbone
from pipeline.model.dense_transformer import DenseTransformer
from pipeline.model.detector import Detector
from pipeline.model.heads import MLP, sigmoid_head, softmax_head
from pipeline.model.layers import in_float32
from pipeline.model.position import shrink, shrink_ceil, sine_position


class DETR(Detector):
    """arXiv 2005.12872, with the published tensor names; only the backbone's prefix differs (`weights.published`)."""

    def __init__(self, config: ModelConfig, load_backbone: bool = True) -> None:
        """Build from the `model` section.

        Args:
            config: sizes and variant.
            load_backbone: False ignores `backbone.weights`, for a model that is filled from a checkpoint.

        Raises:
            ConfigError, CheckpointError: see `build_backbone`.
        """
        backbone = build_backbone(config.backbone, load_backbone)
        super().__init__(config, backbone.strides[-1])
        dim = config.hidden_dim
        self.transformer = DenseTransformer(config)
        make_head = softmax_head if config.class_head == "softmax" else sigmoid_head
        self.class_embed = make_head(dim, config.classes)
        self.bbox_embed = MLP(dim, 4)
        self.query_embed = nn.Embedding(config.queries, dim)
        self.input_proj = nn.Conv2d(backbone.channels[-1], dim, 1)
        self.backbone = backbone

    def forward(
        self, images: Tensor, mask: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Detect.

        Args:
            images: [N, 3, H, W] normalised, zero in the padding.
            mask: bool [N, H, W], True = padding (right and bottom).
            targets: not read.

        Returns:
            `pred_logits` [N, Q, C], or [N, Q, C + 1] and `softmax: True` where the last one is "no object", and
            `pred_boxes` cxcywh [N, Q, 4] relative to the un-padded image, float32; `aux_outputs`: the same of the
            earlier decoder layers.
        """
        images, mask = self.pad_to_stride(images, mask)
        valid = self.valid_pixels(mask)
        maps = self.backbone(images) if valid is None else self.backbone(images, valid)
        feature = self.input_proj(maps[-1])
        padding = shrink(mask, feature) if valid is None else shrink_ceil(mask, feature, self.stride)
        position = sine_position([(~padding).float()], self.config.hidden_dim, offset=0.0)
        hidden = self.transformer(feature, position, padding.flatten(1), self.query_embed.weight)
        logits, boxes = in_float32(self.class_embed, hidden), in_float32(self.bbox_embed, hidden).sigmoid()
        layers = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, boxes, strict=True)]
        outputs: dict[str, Any] = {**layers[-1], "aux_outputs": layers[:-1]}
        if self.config.class_head == "softmax":
            outputs["softmax"] = True
        return outputs
