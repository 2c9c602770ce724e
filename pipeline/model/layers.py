"""Parts shared by deformable and dense transformer layers."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelConfig


class FeedForward(nn.Module):
    """Base of the layers: the FFN. Its tensors belong to the layer itself, as in the published weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_dim, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def ffn(self, x: Tensor) -> Tensor:
        """The residual branch [..., hidden_dim], dropout included."""
        return self.dropout(self.linear2(self.dropout(self.linear1(x).relu())))


def dense_attention(config: ModelConfig) -> nn.MultiheadAttention:
    """Attention of every query to every key, batch first; dropout also acts on attention weights, as published."""
    return nn.MultiheadAttention(config.hidden_dim, config.heads, dropout=config.dropout, batch_first=True)


def attend_to_all(attention: nn.MultiheadAttention, query: Tensor, value: Tensor) -> Tensor:
    """`attention(query, query, value)`, with one product for queries and keys; [N, Q, d] -> [N, Q, d]."""
    parts = [2 * attention.embed_dim, attention.embed_dim]
    weights, biases = attention.in_proj_weight.split(parts), attention.in_proj_bias.split(parts)
    both = linear(query, weights[0], biases[0]).unflatten(-1, (2, attention.num_heads, -1))
    values = linear(value, weights[1], biases[1]).unflatten(-1, (attention.num_heads, -1))
    queries, keys = both.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, Q, d / heads]
    dropout = attention.dropout if attention.training else 0.0
    attended = torch.nn.functional.scaled_dot_product_attention(queries, keys, values.transpose(1, 2), None, dropout)
    # [Q, N, d] in memory, as MultiheadAttention leaves it: a following dropout draws in the order of the memory.
    out: Tensor = attention.out_proj(attended.permute(2, 0, 1, 3).flatten(2))
    return out.transpose(0, 1)


def run_encoder(layers: Iterable[nn.Module], tokens: Tensor, *context: Any, recompute: bool) -> Tensor:
    """Run the layers in order, each with the same `context`.

    Args:
        layers: from tokens [N, S, d] to tokens [N, S, d].
        tokens: input of the first layer.
        context: further arguments of every layer.
        recompute: store only a layer's input, and run the layer again in the backward.
    """
    for layer in layers:
        if recompute and torch.is_grad_enabled():
            tokens = checkpoint(layer, tokens, *context, use_reentrant=False)
        else:
            tokens = layer(tokens, *context)
    return tokens


def clones(module: nn.Module, count: int) -> nn.ModuleList:
    """Copies with equal values and separate tensors."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(count))


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """Run a head without autocast, because its output is a coordinate or a score."""
    output: Tensor
    if not (x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)):
        output = module(x.float())  # without the context, which torch.export cannot read back from a file
        return output
    with no_autocast(x):
        output = module(x.float())
    return output


def cast_for_products(x: Tensor) -> Tensor:
    """The type in which autocast multiplies, for an input of several products: else each of them casts it."""
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def no_autocast(x: Tensor) -> torch.autocast:
    """Disable autocast on the device of `x`; for the meta device, which has no autocast, on the CPU."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)
