"""DETR's layers against the paper's formulas spelled out; masked keys, the decoder's start and its shared norm."""

import math

import pytest
import torch
from support.model import small_detr
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from pipeline.model.dense_transformer import (
    DenseDecoder,
    DenseEncoder,
    DenseEncoderLayer,
    DenseTransformer,
)

DIM, HEADS = 32, 4


def attention(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
    """Softmax attention head by head: [Q, d], [S, d], [S, d], bool [S] -> [Q, d]."""
    projected = [
        linear(x, w, b)
        for x, w, b in zip(
            (query, key, value), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True
        )
    ]
    heads = []
    for q, k, v in zip(*(x.chunk(HEADS, dim=-1) for x in projected), strict=True):
        scores = (q @ k.T / math.sqrt(DIM // HEADS)).masked_fill(padding, -math.inf)
        heads.append(scores.softmax(-1) @ v)
    return module.out_proj(torch.cat(heads, dim=-1))


def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(x, (DIM,), module.weight, module.bias)


def ffn(layer: nn.Module, x: Tensor) -> Tensor:
    hidden = linear(x, layer.linear1.weight, layer.linear1.bias).clamp(min=0)
    return linear(hidden, layer.linear2.weight, layer.linear2.bias)


def randomised(module: nn.Module) -> nn.Module:
    """Make every tensor random, so that no zero bias or unit norm hides a wrong position."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


@pytest.fixture
def padding() -> Tensor:
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[1, 6:] = True
    return mask


def test_dense_encoder_layer_equals_formula(padding: Tensor) -> None:
    layer = randomised(DenseEncoderLayer(small_detr()))
    tokens, position = torch.randn(2, 10, DIM), torch.randn(2, 10, DIM)
    found = layer(tokens, position, padding)
    for image in range(2):
        x, p = tokens[image], position[image]
        x = norm(layer.norm1, x + attention(layer.self_attn, x + p, x + p, x, padding[image]))
        torch.testing.assert_close(found[image], norm(layer.norm2, x + ffn(layer, x)), rtol=1e-4, atol=1e-5)


def test_dense_decoder_equals_formula(padding: Tensor) -> None:
    """Content starts at zero; every layer adds the positions to queries and keys; one norm is shared by all layers."""
    decoder = randomised(DenseDecoder(small_detr()))
    query_pos, memory, position = torch.randn(2, 12, DIM), torch.randn(2, 10, DIM), torch.randn(2, 10, DIM)
    found = decoder(query_pos, memory, position, padding)
    assert found.shape == (3, 2, 12, DIM)
    nobody = torch.zeros(12, dtype=torch.bool)
    for image in range(2):
        x, q, m = torch.zeros(12, DIM), query_pos[image], memory[image]
        for layer, hidden in zip(decoder.layers, found, strict=True):
            x = norm(layer.norm1, x + attention(layer.self_attn, x + q, x + q, x, nobody))
            keys = m + position[image]
            x = norm(layer.norm2, x + attention(layer.multihead_attn, x + q, keys, m, padding[image]))
            x = norm(layer.norm3, x + ffn(layer, x))
            torch.testing.assert_close(hidden[image], norm(decoder.norm, x), rtol=1e-4, atol=1e-4)


def test_dense_transformer_ignores_masked_keys(padding: Tensor) -> None:
    config = small_detr()
    encoder, decoder = randomised(DenseEncoder(config)), randomised(DenseDecoder(config))
    tokens, position, query_pos = torch.randn(2, 10, DIM), torch.randn(2, 10, DIM), torch.randn(2, 12, DIM)
    other, elsewhere = tokens.clone(), position.clone()
    other[padding], elsewhere[padding] = 100.0, -7.0
    memories = encoder(tokens, position, padding), encoder(other, elsewhere, padding)
    torch.testing.assert_close(memories[1][~padding], memories[0][~padding])
    decoded = [decoder(query_pos, m, p, padding) for m, p in zip(memories, (position, elsewhere), strict=True)]
    torch.testing.assert_close(decoded[1], decoded[0])


def test_dense_decoder_attends_to_valid_pixels_only(padding: Tensor) -> None:
    transformer = randomised(DenseTransformer(small_detr(enc_layers=1, dec_layers=1)))
    feature = torch.randn(2, DIM, 2, 5, requires_grad=True)
    hidden = transformer(feature, torch.randn(2, 10, DIM), padding, torch.randn(12, DIM))
    hidden[0, 1, 3, 0].backward()
    touched = feature.grad.abs().sum(1).flatten(1) > 0
    assert not touched[0].any()
    assert torch.equal(touched[1], ~padding[1])


def test_dense_transformer_initialisation_is_published() -> None:
    torch.manual_seed(0)
    transformer = DenseTransformer(small_detr(hidden_dim=64))
    first, second = transformer.encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    for name, parameter in transformer.named_parameters():
        if parameter.dim() > 1:  # Xavier: uniform within sqrt(6 / (fan in + fan out))
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.9 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
    assert not any(layer.self_attn.in_proj_bias.any() for layer in transformer.decoder.layers)


def test_dense_attention_uses_fused_kernel(padding: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix of S x S weights of DC5 would not fit; the fused kernel never holds it."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(tuple(args[0].shape))
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    transformer = DenseTransformer(small_detr(enc_layers=1, dec_layers=1))
    transformer(torch.randn(2, DIM, 2, 5), torch.randn(2, 10, DIM), padding, torch.randn(12, DIM))
    assert calls == [(2, HEADS, 10, 8), (2, HEADS, 12, 8), (2, HEADS, 12, 8)]
