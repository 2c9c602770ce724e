"""`model.checkpoint_encoder`: the same numbers to the bit, dropout included, from fewer saved activations."""

from typing import Any

import pytest
import torch
from support.model import VARIANTS, padded_images, random_targets, small_config
from torch import Tensor, nn

from pipeline.config import LossConfig
from pipeline.model import build_criterion, build_model

SIZES = (64, 96), (80, 64)


def step(recompute: bool, bf16: bool, **variant: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss of one forward, all gradients, and the bytes of activations that were kept in between."""
    torch.manual_seed(0)
    config = small_config(dropout=0.3, op="torch", enc_layers=3, checkpoint_encoder=recompute, **variant)
    model, criterion = build_model(config).train(), build_criterion(LossConfig())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def note_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        note(inputs[0])

    for layer in model.transformer.encoder.layers:  # torch keeps these for the second run without telling the hooks
        layer.register_forward_pre_hook(note_input)
    torch.manual_seed(7)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(*padded_images(*SIZES))
        loss = criterion.total(criterion(outputs, random_targets(3, 2), 5.0))
    held = sum(kept.values())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, held


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_encoder_loss_and_gradients_are_bit_equal(variant: str, bf16: bool) -> None:
    kept, recomputed = (step(recompute, bf16, **VARIANTS[variant]) for recompute in (False, True))
    assert torch.equal(kept[0], recomputed[0])
    assert kept[1].keys() == recomputed[1].keys()
    assert [name for name in kept[1] if not torch.equal(kept[1][name], recomputed[1][name])] == []


def test_checkpoint_encoder_comparison_uses_dropout() -> None:
    torch.manual_seed(0)
    model = build_model(small_config(dropout=0.3, op="torch", checkpoint_encoder=True)).train()
    images = padded_images(*SIZES)
    assert not torch.equal(model(*images)["pred_logits"], model(*images)["pred_logits"])


def test_checkpoint_encoder_keeps_fewer_activations() -> None:
    kept, recomputed = step(False, False)[2], step(True, False)[2]
    assert recomputed < 0.6 * kept


def test_checkpoint_encoder_without_gradients_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("checkpointed in evaluation")

    monkeypatch.setattr("pipeline.model.layers.checkpoint", refuse)
    model = build_model(small_config(op="torch", checkpoint_encoder=True)).eval()
    with torch.no_grad():
        model(*padded_images(*SIZES))
    with pytest.raises(AssertionError):
        model(*padded_images(*SIZES))
