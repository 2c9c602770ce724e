"""Parts shared by the transformers: recomputing encoders, clones, heads without autocast."""

from typing import Any

import pytest
import torch
from support.model import small_config
from torch import Tensor, nn

from pipeline.model.layers import FeedForward, clones, dense_attention, in_float32, run_encoder


class Counted(nn.Module):
    """A layer that counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(4, 4), 0

    def forward(self, tokens: Tensor, shift: Tensor) -> Tensor:
        self.runs += 1
        out: Tensor = self.linear(tokens + shift).tanh()
        return out


def encoded(recompute: bool) -> tuple[Tensor, list[Any], list[int]]:
    torch.manual_seed(0)
    layers = nn.ModuleList([Counted(), Counted()])
    tokens = torch.randn(2, 3, 4, requires_grad=True)
    out = run_encoder(layers, tokens, torch.ones(4), recompute=recompute)
    grads = list(torch.autograd.grad(out.square().sum(), [tokens, *layers.parameters()]))
    return out, grads, [layer.runs for layer in layers]


def test_run_encoder_recompute_gives_same_numbers() -> None:
    kept, again = encoded(False), encoded(True)
    assert (kept[2], again[2]) == ([1, 1], [2, 2])
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))


def test_run_encoder_without_gradients_runs_once() -> None:
    layer = Counted()
    with torch.no_grad():
        run_encoder([layer], torch.zeros(1, 1, 4), torch.zeros(4), recompute=True)
    assert layer.runs == 1


def test_clones_are_equal_and_separate() -> None:
    first, second = clones(nn.Linear(3, 3), 2)
    assert torch.equal(first.weight, second.weight)
    assert first.weight.data_ptr() != second.weight.data_ptr()


def test_in_float32_disables_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert in_float32(nn.Linear(4, 4), torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dropout_reaches_ffn_and_attention(dropout: float) -> None:
    config = small_config(dropout=dropout)
    assert FeedForward(config).dropout.p == dense_attention(config).dropout == dropout
