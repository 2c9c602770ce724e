"""The transformer of DETR: attention of every pixel to every pixel, and of learned queries to all of them.

Layers are post-norm, batch first; the position is added to queries and keys of every layer, not to the values. Norm,
dropout and tensor names follow arXiv 2005.12872 (appendix A.3) and its published weights. Shapes are not checked.
"""

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.model.layers import FeedForward, clones, dense_attention, run_encoder


class DenseEncoderLayer(FeedForward):
    """Every pixel attends to all pixels of its image; the cost grows as S^2.

    With PyTorch's fused kernels the memory is linear in S. The CPU's kernel has no dropout of attention weights, so
    training there stores S^2 of them for every head.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.self_attn = dense_attention(config)
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.norm2 = nn.LayerNorm(config.hidden_dim)

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """Tokens and position [N, S, d], padding bool [N, S] -> [N, S, d]."""
        query = tokens + position
        attended = self.self_attn(query, query, tokens, key_padding_mask=padding, need_weights=False)[0]
        tokens = self.norm1(tokens + self.dropout(attended))
        return self.norm2(tokens + self.ffn(tokens))


class DenseDecoderLayer(FeedForward):
    """Queries attend to each other, then to all pixels of their image."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.self_attn = dense_attention(config)
        self.multihead_attn = dense_attention(config)
        # numbered in the order of use, unlike the deformable decoder's
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.norm2 = nn.LayerNorm(config.hidden_dim)
        self.norm3 = nn.LayerNorm(config.hidden_dim)

    def forward(self, target: Tensor, query_pos: Tensor, memory: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
        """Target and query_pos [N, Q, d]; memory and keys, its sum with the position, [N, S, d] -> [N, Q, d]."""
        query = target + query_pos
        attended = self.self_attn(query, query, target, need_weights=False)[0]
        target = self.norm1(target + self.dropout(attended))
        attended = self.multihead_attn(target + query_pos, keys, memory, key_padding_mask=padding, need_weights=False)[
            0
        ]
        target = self.norm2(target + self.dropout(attended))
        return self.norm3(target + self.ffn(target))


class DenseEncoder(nn.Module):
    """A stack of encoder layers; no norm at its end. With `checkpoint_encoder` each runs again in the backward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = clones(DenseEncoderLayer(config), config.enc_layers)
        self.recompute = config.checkpoint_encoder

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """Tokens and position [N, S, d], padding bool [N, S] -> memory [N, S, d]."""
        return run_encoder(self.layers, tokens, position, padding, recompute=self.recompute)


class DenseDecoder(nn.Module):
    """A stack of decoder layers; one shared LayerNorm is applied to each layer's output for the heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = clones(DenseDecoderLayer(config), config.dec_layers)
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, query_pos: Tensor, memory: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """Learned query_pos [N, Q, d], memory and position [N, S, d], padding bool [N, S] -> per layer [L, N, Q, d]."""
        target, keys = torch.zeros_like(query_pos), memory + position
        hidden = []
        for layer in self.layers:
            target = layer(target, query_pos, memory, keys, padding)
            hidden.append(self.norm(target))
        return torch.stack(hidden)


class DenseTransformer(nn.Module):
    """Encoder and decoder over one feature level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = DenseEncoder(config)
        self.decoder = DenseDecoder(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every matrix; attention's in-projection counts as one matrix."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, feature: Tensor, position: Tensor, padding: Tensor, query_embed: Tensor) -> Tensor:
        """Run encoder and decoder.

        Args:
            feature: [N, d, H, W].
            position: [N, H * W, d].
            padding: bool [N, H * W], True = padding: no query attends to it.
            query_embed: [Q, d], the same for every image.

        Returns:
            [L, N, Q, d], of every decoder layer.
        """
        memory = self.encoder(feature.flatten(2).transpose(1, 2), position, padding)
        query_pos = query_embed.expand(feature.shape[0], -1, -1)
        hidden: Tensor = self.decoder(query_pos, memory, position, padding)
        return hidden
