"""Encoder, decoder and queries: their dependencies and detached tensors."""

import pytest
import torch
from support.model import small_config
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.model.layers import clones
from pipeline.model.position import Pyramid
from pipeline.model.transformer import Decoder, DeformableTransformer, Encoder

DIM = 32


@pytest.fixture
def pyramid() -> Pyramid:
    return Pyramid.of([torch.zeros(2, s, s, dtype=torch.bool) for s in (8, 4, 2)])


def heads(count: int) -> nn.ModuleList:
    return clones(nn.Linear(DIM, 4), count)


def decoder_inputs(pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor, Tensor, Pyramid]:
    torch.manual_seed(0)
    target, position = torch.randn(2, 12, DIM), torch.randn(2, 12, DIM)
    return target, position, torch.rand(2, 12, 2), torch.randn(2, pyramid.tokens, DIM), pyramid


def test_encoder_attends_across_levels(pyramid: Pyramid) -> None:
    torch.manual_seed(0)
    encoder = Encoder(small_config(enc_layers=1))
    tokens = torch.randn(2, pyramid.tokens, DIM, requires_grad=True)
    memory = encoder(tokens, torch.zeros_like(tokens), pyramid)
    assert memory.shape == tokens.shape
    (memory[0, -1] @ torch.randn(DIM)).backward()  # a plain sum is constant after a LayerNorm
    assert tokens.grad is not None
    touched = tokens.grad.abs().sum(-1) > 0
    assert all(part.any() for part in touched[0].split([64, 16, 4]))
    assert not touched[1].any()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_encoder_without_cross_level_separates_levels(pyramid: Pyramid, checkpointed: bool) -> None:
    torch.manual_seed(0)
    encoder = Encoder(small_config(cross_level=False, checkpoint_encoder=checkpointed))
    sizes = [64, 16, 4]
    for level, size in enumerate(sizes):
        tokens = torch.randn(2, pyramid.tokens, DIM, requires_grad=True)
        position = torch.randn(2, pyramid.tokens, DIM, requires_grad=True)
        memory = encoder(tokens, position, pyramid).split(sizes, dim=1)[level]
        (memory[0] @ torch.randn(DIM)).square().sum().backward()
        for leaf in (tokens, position):
            assert leaf.grad is not None
        touched = [part.any() for part in tokens.grad[0].split(sizes)]
        assert touched == [other == level for other in range(3)]
        assert tokens.grad[0].split(sizes)[level].any(-1).sum() > size // 2


def padded_pyramid() -> Pyramid:
    masks = [torch.zeros(2, h, w, dtype=torch.bool) for h, w in ((8, 12), (4, 6), (2, 3))]
    for mask in masks:
        mask[1, :, mask.shape[2] * 2 // 3 :] = True
    return Pyramid.of(masks)


def lively(encoder: Encoder) -> Encoder:
    """Offsets and weights that depend on the query, which they do not at the start."""
    for layer in encoder.layers:
        for linear in (layer.self_attn.sampling_offsets, layer.self_attn.attention_weights):
            nn.init.normal_(linear.weight, std=0.3)
    return encoder


def test_encoder_without_cross_level_equals_single_levels() -> None:
    """The same weights serve each level as they would an image that has no other level, padding included."""
    torch.manual_seed(0)
    encoder, pyramid = lively(Encoder(small_config(cross_level=False))), padded_pyramid()
    tokens, position = torch.randn(2, pyramid.tokens, DIM), torch.randn(2, pyramid.tokens, DIM)
    memory = encoder(tokens, position, pyramid)
    single = Encoder(small_config(levels=1))
    single.load_state_dict(encoder.state_dict())
    start = 0
    for own in pyramid.levels():
        part = slice(start, start + own.tokens)
        start += own.tokens
        torch.testing.assert_close(memory[:, part], single(tokens[:, part], position[:, part], own))


def test_encoder_one_level_cross_level_makes_no_difference() -> None:
    torch.manual_seed(0)
    own, across = (lively(Encoder(small_config(levels=1, cross_level=c))) for c in (False, True))
    across.load_state_dict(own.state_dict())
    pyramid = padded_pyramid().levels()[0]
    tokens, position = torch.randn(2, pyramid.tokens, DIM), torch.randn(2, pyramid.tokens, DIM)
    assert torch.equal(own(tokens, position, pyramid), across(tokens, position, pyramid))


def saved_bytes(encoder: Encoder, tokens: Tensor, pyramid: Pyramid) -> tuple[Tensor, int]:
    """The memory, and what autograd keeps for its backward."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        return encoder(tokens, torch.zeros_like(tokens), pyramid), kept


@pytest.mark.parametrize("cross_level", [True, False])
def test_encoder_checkpointing_keeps_less_with_same_results(pyramid: Pyramid, cross_level: bool) -> None:
    """The same dropout in the second run of a layer, the same gradients, a fraction of the memory."""
    torch.manual_seed(0)
    plain, checkpointed = (
        lively(Encoder(small_config(dropout=0.2, cross_level=cross_level, checkpoint_encoder=c))) for c in (False, True)
    )
    checkpointed.load_state_dict(plain.state_dict())
    results, bytes_kept = [], []
    for encoder in (plain, checkpointed):
        tokens = torch.randn(2, pyramid.tokens, DIM, generator=torch.Generator().manual_seed(2)).requires_grad_()
        memory, kept = saved_bytes(encoder, tokens, pyramid)
        results.append([memory, *torch.autograd.grad(memory.square().sum(), [tokens, *encoder.parameters()])])
        bytes_kept.append(kept)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert bytes_kept[1] < bytes_kept[0] / 4


def test_encoder_position_reaches_queries_only(pyramid: Pyramid) -> None:
    """With offsets and weights that ignore the query, as initialised, a position changes nothing."""
    encoder = Encoder(small_config())
    tokens = torch.randn(2, pyramid.tokens, DIM)
    same = encoder(tokens, torch.zeros_like(tokens), pyramid)
    torch.testing.assert_close(encoder(tokens, torch.randn_like(tokens), pyramid), same)


def test_decoder_refine_starts_from_last_box(pyramid: Pyramid) -> None:
    decoder, bbox_embed = Decoder(small_config(refine=True)), heads(3)
    hidden, boxes = decoder(*decoder_inputs(pyramid), bbox_embed)
    assert [h.shape for h in hidden] == [(2, 12, DIM)] * 3
    assert [b.shape for b in boxes] == [(2, 12, 4)] * 3
    for layer in (1, 2):  # a head that adds nothing leaves the box as it was
        nn.init.zeros_(bbox_embed[layer].weight)
        nn.init.zeros_(bbox_embed[layer].bias)
    _, boxes = decoder(*decoder_inputs(pyramid), bbox_embed)
    torch.testing.assert_close(boxes[2], boxes[0])


def test_decoder_refine_is_detached(pyramid: Pyramid) -> None:
    decoder, bbox_embed = Decoder(small_config(refine=True)), heads(3)
    _, boxes = decoder(*decoder_inputs(pyramid), bbox_embed)
    boxes[1].sum().backward()
    assert [head.weight.grad is not None for head in bbox_embed] == [False, True, False]


def test_decoder_without_refine_shares_reference_and_head(pyramid: Pyramid) -> None:
    decoder, bbox_embed = Decoder(small_config()), heads(1)
    nn.init.zeros_(bbox_embed[0].weight)
    nn.init.zeros_(bbox_embed[0].bias)
    inputs = decoder_inputs(pyramid)
    _, boxes = decoder(*inputs, bbox_embed)
    for layer in boxes:
        torch.testing.assert_close(layer[..., :2], inputs[2])


def test_learned_queries_split_position_and_content() -> None:
    transformer = DeformableTransformer(small_config())
    embed = torch.randn(12, 2 * DIM)
    queries = transformer.learned_queries(embed, batch=3)
    assert torch.equal(queries.position[2], embed[:, :DIM])
    assert torch.equal(queries.target[0], embed[:, DIM:])
    torch.testing.assert_close(queries.reference[1], transformer.reference_points(embed[:, :DIM]).sigmoid())


def test_proposed_queries_are_best_by_class_zero(pyramid: Pyramid) -> None:
    torch.manual_seed(0)
    transformer = DeformableTransformer(small_config(refine=True, two_stage=True))
    class_head, bbox_head = nn.Linear(DIM, 5), nn.Linear(DIM, 4)
    memory = torch.randn(2, pyramid.tokens, DIM, requires_grad=True)
    queries = transformer.proposed_queries(memory, pyramid, class_head, bbox_head, 12)
    assert queries.enc_outputs is not None
    logits, boxes = queries.enc_outputs["pred_logits"], queries.enc_outputs["pred_boxes"]
    assert logits.shape == (2, pyramid.tokens, 5)
    for image in range(2):
        best = logits[image, :, 0].argsort(descending=True)[:12]
        torch.testing.assert_close(queries.reference[image], boxes[image, best])
    assert not queries.reference.requires_grad
    boxes.sum().backward()  # infinite logits of unusable proposals must not poison the gradient
    assert memory.grad is not None
    assert memory.grad.isfinite().all()


def test_proposed_queries_too_few_tokens_raises(pyramid: Pyramid) -> None:
    transformer = DeformableTransformer(small_config(refine=True, two_stage=True))
    with pytest.raises(ConfigError, match=r"model\.queries=85.*\b84\b"):
        transformer.proposed_queries(torch.randn(2, 84, DIM), pyramid, nn.Linear(DIM, 5), nn.Linear(DIM, 4), 85)


def test_transformer_initialisation_is_published() -> None:
    transformer = DeformableTransformer(small_config(hidden_dim=64, levels=4))
    assert not transformer.reference_points.bias.any()
    assert transformer.level_embed.shape == (4, 64)
    assert 0.7 < transformer.level_embed.std() < 1.3
    first, second = transformer.encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert not first.self_attn.sampling_offsets.weight.any()  # Xavier came first, the module's own init last
