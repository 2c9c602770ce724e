"""Deformable DETR: backbone, input projections, neck, transformer and heads, one-stage, refined and two-stage.

Every tensor has one name in `state_dict`: heads that layers share are a list of one. A two-stage model with fewer
tokens than queries is a ConfigError.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.model.backbones.build import build_backbone
from pipeline.model.backbones.norms import GroupNorm, subsample
from pipeline.model.detector import Detector
from pipeline.model.heads import delta_head, sigmoid_head
from pipeline.model.layers import clones, in_float32
from pipeline.model.necks import build_neck
from pipeline.model.position import Pyramid, shrink, shrink_ceil, sine_position
from pipeline.model.transformer import DeformableTransformer


class DeformableDETR(Detector):
    """arXiv 2010.04159, with the published tensor names, except aliases (`weights.published` maps those)."""

    def __init__(self, config: ModelConfig, load_backbone: bool = True) -> None:
        """Build from the `model` section.

        Args:
            config: sizes and variant.
            load_backbone: False ignores `backbone.weights`, for a model that is filled from a checkpoint.

        Raises:
            ConfigError, CheckpointError: see `build_backbone`.
        """
        backbone = build_backbone(config.backbone, load_backbone)
        extra = range(1, config.levels - len(backbone.strides) + 1)
        self.strides = (*backbone.strides, *(backbone.strides[-1] * 2**k for k in extra))[-config.levels :]
        super().__init__(config, self.strides[-1])
        dim = config.hidden_dim
        self.transformer = DeformableTransformer(config)
        heads = config.dec_layers + int(config.two_stage) if config.refine else 1
        self.class_embed = clones(sigmoid_head(dim, config.classes), heads)
        self.bbox_embed = clones(delta_head(dim), heads)
        if not config.two_stage:
            # Boxes start small. Later heads of `refine` only correct them, and two-stage starts from proposals.
            nn.init.constant_(self.bbox_embed.get_parameter("0.layers.2.bias")[2:], -2.0)
            self.query_embed = nn.Embedding(config.queries, 2 * dim)
        self.backbone = backbone
        self.input_proj = _input_projections(self.backbone.channels, config.levels, dim)
        self.neck = build_neck(config)

    def forward(
        self, images: Tensor, mask: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Detect.

        Args:
            images: [N, 3, H, W] normalised, zero in the padding.
            mask: bool [N, H, W], True = padding (right and bottom).
            targets: not read.

        Returns:
            `pred_logits` [N, Q, C] and `pred_boxes` cxcywh [N, Q, 4] relative to the un-padded image, float32;
            `aux_outputs`: the same of the earlier decoder layers; in two-stage `enc_outputs`: the same of all tokens.

        Raises:
            ConfigError: the images have fewer tokens than two-stage needs.
        """
        images, mask = self.pad_to_stride(images, mask)
        valid = self.valid_pixels(mask)
        features = self._features(images, valid)
        if valid is None:
            masks = [shrink(mask, feature) for feature in features]
        else:
            masks = [shrink_ceil(mask, x, stride) for x, stride in zip(features, self.strides, strict=True)]
        pyramid = Pyramid.of(masks)
        position = sine_position(pyramid.valid, self.config.hidden_dim)
        memory = self.transformer.encode(features, position, pyramid)
        if self.config.two_stage:
            heads = self.class_embed[-1], self.bbox_embed[-1]
            queries = self.transformer.proposed_queries(memory, pyramid, *heads, self.config.queries)
        else:
            queries = self.transformer.learned_queries(self.query_embed.weight, images.shape[0])
        hidden, boxes = self.transformer.decoder(
            queries.target, queries.position, queries.reference, memory, pyramid, self.bbox_embed
        )
        logits = self._logits(hidden)
        layers = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, boxes, strict=True)]
        outputs: dict[str, Any] = {**layers[-1], "aux_outputs": layers[:-1]}
        if queries.enc_outputs is not None:
            outputs["enc_outputs"] = queries.enc_outputs
        return outputs

    def _logits(self, hidden: list[Tensor] | Tensor) -> list[Tensor]:
        """The logits [N, Q, C] of each decoder layer's output [N, Q, d]."""
        if isinstance(hidden, Tensor):
            return [*in_float32(self.class_embed[0], hidden).unbind(0)]
        shared = len(self.class_embed) == 1
        return [in_float32(self.class_embed[0 if shared else layer], h) for layer, h in enumerate(hidden)]

    def _features(self, images: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """The levels [N, hidden_dim, H, W]: projected backbone maps, then coarser ones; mixed by the neck.

        Given the valid pixels [N, 1, H, W] they are zero in the padding, and do not depend on it.
        """
        maps = self.backbone(images) if valid is None else self.backbone(images, valid)
        maps = maps[-self.config.levels :]
        maps.append(maps[-1])  # the first extra level is computed from C5, further ones from the previous level
        features: list[Tensor] = []
        for level, (project, stride) in enumerate(zip(self.input_proj, self.strides, strict=True)):
            conv, norm = project.children()
            x = conv(maps[level] if level < len(maps) else features[-1])
            features.append(norm(x, subsample(valid, stride)))
        return features if self.neck is None else self.neck(features)


def _input_projections(channels: tuple[int, ...], levels: int, dim: int) -> nn.ModuleList:
    """1x1 convolutions of the deepest backbone maps, then 3x3 stride-2 ones for further levels, each with GroupNorm."""
    used = channels[-levels:]
    extra = [*used[-1:], *[dim] * levels][: levels - len(used)]
    convs = [nn.Conv2d(c, dim, 1) for c in used] + [nn.Conv2d(c, dim, 3, stride=2, padding=1) for c in extra]
    for conv in convs:
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # Conv2d.bias is typed optional; these have one
    return nn.ModuleList(nn.Sequential(conv, GroupNorm(math.gcd(32, dim), dim)) for conv in convs)
