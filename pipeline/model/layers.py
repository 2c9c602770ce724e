"""What deformable and dense transformer layers have in common. Used by `transformer` and `dense_transformer`."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelConfig
from pipeline.model.linear import Linear


class FeedForward(nn.Module):
    """Base of the layers: their FFN, whose tensors belong to the layer itself as in the published weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear1 = Linear(config.hidden_dim, config.ffn_dim)
        self.linear2 = Linear(config.ffn_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def ffn(self, x: Tensor) -> Tensor:
        """The residual branch [..., hidden_dim], dropout included."""
        return self.dropout(self.linear2(self.dropout(self.linear1(x).relu())))


def dense_attention(config: ModelConfig) -> nn.MultiheadAttention:
    """Attention of every query to every key, batch first; it drops attention weights, too, as published."""
    return nn.MultiheadAttention(config.hidden_dim, config.heads, dropout=config.dropout, batch_first=True)


def run_encoder(layers: Iterable[nn.Module], tokens: Tensor, *context: Any, recompute: bool) -> Tensor:
    """One layer after the other, each given `context`, too.

    Args:
        layers: from tokens [N, S, d] to tokens [N, S, d].
        tokens: what the first one starts from.
        context: the same for all layers.
        recompute: keep only what enters a layer, and run it again in the backward.
    """
    for layer in layers:
        if recompute and torch.is_grad_enabled():
            tokens = checkpoint(layer, tokens, *context, use_reentrant=False)
        else:
            tokens = layer(tokens, *context)
    return tokens


def clones(module: nn.Module, count: int) -> nn.ModuleList:
    """Copies that start equal and own their tensors."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(count))


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """Run a head outside of autocast: its output is a coordinate or a score."""
    output: Tensor
    if not (x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)):
        output = module(x.float())  # without the context, which torch.export cannot read back from a file
        return output
    with no_autocast(x):
        output = module(x.float())
    return output


def no_autocast(x: Tensor) -> torch.autocast:
    """A context without autocast where `x` is; on the meta device, which has none, that of the CPU does no harm."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)
