"""The deformable transformer: encoder over all levels, decoder of object queries, proposals of the two-stage variant.

`deformable.DeformableDETR` owns the prediction heads and passes them in, so that no tensor has two names. Layers are
post-norm, batch first. Norm and dropout follow arXiv 2010.04159 and its published weights. Fewer tokens than two-stage
queries are a ConfigError.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.model.attention import MSDeformAttn, project_values
from pipeline.model.boxes import apply_delta
from pipeline.model.layers import (
    FeedForward,
    attend_to_all,
    cast_for_products,
    clones,
    dense_attention,
    in_float32,
    run_encoder,
)
from pipeline.model.position import Pyramid, box_position

_NEVER = -100.0  # logit of padding: its probability, focal loss and gradient are 0


class EncoderLayer(FeedForward):
    """Every pixel attends to points around itself, on all levels or, without `cross_level`, on its own level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.merge = config.merge_layers
        self.cross_level = config.cross_level
        levels = config.levels if config.cross_level else 1  # without it all levels share one set of weights
        self.self_attn = MSDeformAttn(config.hidden_dim, config.heads, levels, config.enc_points, config.op)
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.norm2 = nn.LayerNorm(config.hidden_dim)

    def forward(self, tokens: Tensor, position: Tensor, references: Tensor, pyramid: Pyramid) -> Tensor:
        """Tokens and position [N, S, d], references [N, S, L, 2] -> [N, S, d]."""
        query = tokens + position
        if self.merge:
            query = cast_for_products(query)
        if self.cross_level:
            attended = self.self_attn(query, references, tokens, pyramid)
        else:
            attended = self._attend_own_level(query, references, tokens, pyramid)
        tokens = self.norm1(tokens + self.dropout(attended))
        return self.norm2(tokens + self.ffn(tokens))

    def _attend_own_level(self, query: Tensor, references: Tensor, tokens: Tensor, pyramid: Pyramid) -> Tensor:
        """Attend within each level separately; arguments as of `self_attn`."""
        attended, start = [], 0
        for level, own in enumerate(pyramid.levels()):
            part = slice(start, start + own.tokens)
            attended.append(self.self_attn(query[:, part], references[:, part, level, None], tokens[:, part], own))
            start += own.tokens
        return torch.cat(attended, dim=1)


class DecoderLayer(FeedForward):
    """Queries attend to each other, then to points of the memory around their reference."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.merge = config.merge_layers
        self.self_attn = dense_attention(config)
        self.cross_attn = MSDeformAttn(config.hidden_dim, config.heads, config.levels, config.dec_points, config.op)
        # Numbered as in the published weights: norm2 follows the self-attention, norm1 the cross-attention.
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.norm2 = nn.LayerNorm(config.hidden_dim)
        self.norm3 = nn.LayerNorm(config.hidden_dim)

    def forward(
        self,
        target: Tensor,
        query_pos: Tensor,
        references: Tensor,
        memory: Tensor,
        pyramid: Pyramid,
        value: Tensor | None = None,
    ) -> Tensor:
        """Target and query_pos [N, Q, d], references [N, Q, L, 2 or 4], memory [N, S, d] -> [N, Q, d].

        `value` [N, S, d] is the memory as `attention.project_values` projects it, where that was done before.
        """
        query = target + query_pos
        if self.merge:
            attended = attend_to_all(self.self_attn, cast_for_products(query), target)
        else:
            attended = self.self_attn(query, query, target, need_weights=False)[0]
        target = self.norm2(target + self.dropout(attended))
        query = cast_for_products(target + query_pos) if self.merge else target + query_pos
        if value is None:
            attended = self.cross_attn(query, references, memory, pyramid)
        else:
            attended = self.cross_attn.attend(query, references, value, pyramid)
        target = self.norm1(target + self.dropout(attended))
        return self.norm3(target + self.ffn(target))


class Encoder(nn.Module):
    """A stack of encoder layers; no norm at its end. With `checkpoint_encoder` each runs again in the backward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = clones(EncoderLayer(config), config.enc_layers)
        self.recompute = config.checkpoint_encoder

    def forward(self, tokens: Tensor, position: Tensor, pyramid: Pyramid) -> Tensor:
        """Tokens and position [N, S, d] -> memory [N, S, d]."""
        references = pyramid.on_levels(pyramid.centres())
        return run_encoder(self.layers, tokens, position, references, pyramid, recompute=self.recompute)


class Decoder(nn.Module):
    """A stack of decoder layers. Each layer predicts a box; with `refine` the next layer starts from that box.

    With `merge_layers` the memory's values of all layers are one product, and so are all boxes if nothing is refined.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.refine = config.refine
        self.merge = config.merge_layers
        self.layers = clones(DecoderLayer(config), config.dec_layers)

    def forward(
        self,
        target: Tensor,
        query_pos: Tensor,
        reference: Tensor,
        memory: Tensor,
        pyramid: Pyramid,
        bbox_embed: nn.ModuleList,
    ) -> tuple[list[Tensor] | Tensor, list[Tensor]]:
        """Run all layers.

        Args:
            target: [N, Q, d] content of the queries.
            query_pos: [N, Q, d] their position embedding.
            reference: float32 [N, Q, 2] points or [N, Q, 4] boxes_cxcywh, relative to the un-padded image.
            memory: [N, S, d] from the encoder.
            pyramid: geometry of the memory.
            bbox_embed: box head of each layer, or a single one that all share.

        Returns:
            Per layer: hidden [N, Q, d], and boxes_cxcywh float32 [N, Q, 4]. If heads are merged, `hidden` is one
            tensor [layers, N, Q, d].
        """
        hidden: list[Tensor] = []
        boxes: list[Tensor] = []
        attentions: list[Any] = [layer.cross_attn for layer in self.layers]  # a ModuleList does not know its members
        values = project_values(attentions, memory, pyramid) if self.merge else [None] * len(attentions)
        if self.merge and not self.refine:
            references = pyramid.on_levels(reference)
            for layer, value in zip(self.layers, values, strict=True):
                target = layer(target, query_pos, references, memory, pyramid, value)
                hidden.append(target)
            stacked = torch.stack(hidden)
            return stacked, [*apply_delta(in_float32(bbox_embed[0], stacked), reference).unbind(0)]
        for index, (layer, value) in enumerate(zip(self.layers, values, strict=True)):
            target = layer(target, query_pos, pyramid.on_levels(reference), memory, pyramid, value)
            head = bbox_embed[index if len(bbox_embed) > 1 else 0]
            hidden.append(target)
            boxes.append(apply_delta(in_float32(head, target), reference))
            if self.refine:
                reference = boxes[-1].detach()
        return hidden, boxes


@dataclass(frozen=True)
class Queries:
    """The decoder's input; in two-stage also the encoder's predictions from which it was selected."""

    target: Tensor  # [N, Q, d] content
    position: Tensor  # [N, Q, d]
    reference: Tensor  # float32 [N, Q, 2] points, or [N, Q, 4] boxes_cxcywh
    enc_outputs: dict[str, Tensor] | None = None  # pred_logits [N, S, C], pred_boxes [N, S, 4]


class DeformableTransformer(nn.Module):
    """Encoder, decoder, and the decoder's input from learned queries or from the encoder's memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.norm_valid = config.norm_valid
        self.level_embed = nn.Parameter(torch.empty(config.levels, dim))
        if config.two_stage:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.pos_trans = nn.Linear(2 * dim, 2 * dim)
            self.pos_trans_norm = nn.LayerNorm(2 * dim)
        else:
            self.reference_points = nn.Linear(dim, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every matrix; attention, reference points and level embedding have their own initialisation."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if hasattr(self, "reference_points"):
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def encode(self, features: list[Tensor], position: Tensor, pyramid: Pyramid) -> Tensor:
        """Levels [N, d, H, W] and the position of all their pixels [N, S, d] -> memory [N, S, d]."""
        tokens = torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], dim=1)
        batch = position.shape[0]  # no len: an exporter would fix the number of images
        counts = [height * width for height, width in pyramid.shapes]
        levels = [row.expand(batch, n, -1) for row, n in zip(self.level_embed, counts, strict=True)]
        memory: Tensor = self.encoder(tokens, position + torch.cat(levels, dim=1), pyramid)
        return memory

    def learned_queries(self, query_embed: Tensor, batch: int) -> Queries:
        """Split [Q, 2 d] into position and content, and predict the reference points from the position."""
        position, target = query_embed[None].expand(batch, -1, -1).chunk(2, dim=-1)
        return Queries(target, position, in_float32(self.reference_points, position).sigmoid())

    def proposed_queries(
        self, memory: Tensor, pyramid: Pyramid, class_head: nn.Module, bbox_head: nn.Module, queries: int
    ) -> Queries:
        """Score a box around every token and make queries of the best ones (two-stage, appendix A.4).

        Raises:
            ConfigError: the images have fewer tokens than there are queries.
        """
        if pyramid.tokens < queries:
            raise ConfigError(
                f"model.two_stage selects model.queries={queries} proposals, but an image has only {pyramid.tokens} "
                f"tokens (levels {list(pyramid.shapes)}); lower model.queries or raise the image size"
            )
        proposals, unusable = pyramid.proposals()
        candidates = self.enc_output_norm(self.enc_output(memory.masked_fill(unusable, 0)))
        logits = in_float32(class_head, candidates)
        if self.norm_valid:  # as published, padding has the score of an empty token, is selected and adds to the loss
            logits = logits.masked_fill(pyramid.padding[..., None], _NEVER)
        box_logits = in_float32(bbox_head, candidates) + proposals
        best = logits[..., 0].topk(queries, dim=1).indices  # class 0 means "object" in the encoder's loss
        chosen = box_logits.detach().gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
        embedding = self.pos_trans_norm(self.pos_trans(box_position(chosen, memory.shape[-1] // 2)))
        position, target = embedding.chunk(2, dim=-1)
        return Queries(target, position, chosen, {"pred_logits": logits, "pred_boxes": box_logits.sigmoid()})
