"""Encoder, decoder and queries: who depends on whom, and what is detached."""

import pytest
import torch
from helpers_model import small_config
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


def test_position_reaches_the_queries_only(pyramid: Pyramid) -> None:
    """With offsets and weights that ignore the query, as initialised, a position changes nothing."""
    encoder = Encoder(small_config())
    tokens = torch.randn(2, pyramid.tokens, DIM)
    same = encoder(tokens, torch.zeros_like(tokens), pyramid)
    torch.testing.assert_close(encoder(tokens, torch.randn_like(tokens), pyramid), same)


def test_refinement_starts_each_layer_from_the_last_box(pyramid: Pyramid) -> None:
    decoder, bbox_embed = Decoder(small_config(refine=True)), heads(3)
    hidden, boxes = decoder(*decoder_inputs(pyramid), bbox_embed)
    assert [h.shape for h in hidden] == [(2, 12, DIM)] * 3
    assert [b.shape for b in boxes] == [(2, 12, 4)] * 3
    for layer in (1, 2):  # a head that adds nothing leaves the box as it was
        nn.init.zeros_(bbox_embed[layer].weight)
        nn.init.zeros_(bbox_embed[layer].bias)
    _, boxes = decoder(*decoder_inputs(pyramid), bbox_embed)
    torch.testing.assert_close(boxes[2], boxes[0])


def test_refinement_is_detached_between_layers(pyramid: Pyramid) -> None:
    decoder, bbox_embed = Decoder(small_config(refine=True)), heads(3)
    _, boxes = decoder(*decoder_inputs(pyramid), bbox_embed)
    boxes[1].sum().backward()
    assert [head.weight.grad is not None for head in bbox_embed] == [False, True, False]


def test_without_refinement_all_layers_share_reference_and_head(pyramid: Pyramid) -> None:
    decoder, bbox_embed = Decoder(small_config()), heads(1)
    nn.init.zeros_(bbox_embed[0].weight)
    nn.init.zeros_(bbox_embed[0].bias)
    inputs = decoder_inputs(pyramid)
    _, boxes = decoder(*inputs, bbox_embed)
    for layer in boxes:
        torch.testing.assert_close(layer[..., :2], inputs[2])


def test_learned_queries_split_into_position_and_content() -> None:
    transformer = DeformableTransformer(small_config())
    embed = torch.randn(12, 2 * DIM)
    queries = transformer.learned_queries(embed, batch=3)
    assert torch.equal(queries.position[2], embed[:, :DIM])
    assert torch.equal(queries.target[0], embed[:, DIM:])
    torch.testing.assert_close(queries.reference[1], transformer.reference_points(embed[:, :DIM]).sigmoid())


def test_proposed_queries_are_the_best_by_class_zero(pyramid: Pyramid) -> None:
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


def test_too_few_tokens_for_the_queries(pyramid: Pyramid) -> None:
    transformer = DeformableTransformer(small_config(refine=True, two_stage=True))
    with pytest.raises(ConfigError, match=r"model.queries=85.*only 84 tokens"):
        transformer.proposed_queries(torch.randn(2, 84, DIM), pyramid, nn.Linear(DIM, 5), nn.Linear(DIM, 4), 85)


def test_initialisation() -> None:
    transformer = DeformableTransformer(small_config(hidden_dim=64, levels=4))
    assert not transformer.reference_points.bias.any()
    assert transformer.level_embed.shape == (4, 64)
    assert 0.7 < transformer.level_embed.std() < 1.3
    first, second = transformer.encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert not first.self_attn.sampling_offsets.weight.any()  # Xavier came first, the module's own init last
