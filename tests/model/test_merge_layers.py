"""`model.merge_layers`: products of several layers at once give the numbers of single ones, dropout included."""

from typing import Any

import pytest
import torch
from support.model import VARIANTS, padded_images, random_targets, small_config
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.model import build_criterion, build_model


def step(merge: bool, **variant: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses of one forward and all gradients."""
    torch.manual_seed(0)
    model, criterion = build_model(small_config(merge_layers=merge, **variant)), build_criterion(LossConfig())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.manual_seed(7)  # of dropout
    losses = criterion(model(*padded_images((64, 96), (80, 64))), random_targets(3, 2), 5.0)
    torch.autograd.backward(criterion.total(losses))
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_layers_have_the_same_losses_and_gradients(variant: str, dropout: float) -> None:
    (losses, grads), (merged, merged_grads) = (step(m, dropout=dropout, **VARIANTS[variant]) for m in (False, True))
    assert merged.keys() == losses.keys()
    torch.testing.assert_close(merged, losses, rtol=1e-5, atol=1e-6)
    assert merged_grads.keys() == grads.keys()
    for name, grad in grads.items():
        scale = float(grad.abs().max()) + 1
        torch.testing.assert_close(merged_grads[name], grad, rtol=1e-3, atol=1e-5 * scale, msg=name)
