"""What a training step keeps and computes, counted from shapes, against a real forward pass."""

from collections.abc import Callable

import pytest
import torch
from support.model import small_config
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.model import build_model
from pipeline.model.footprint import training_footprint


def kept_by(config: ModelConfig, side: int) -> int:
    """Bytes that a real forward pass keeps, each storage once, without weights."""
    model = build_model(config).train()
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, unpack):
        model(torch.zeros(1, 3, side, side), torch.zeros(1, side, side, dtype=torch.bool))
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)


@pytest.mark.parametrize("changes", [{}, {"refine": True, "levels": 3}])
def test_footprint_counts_what_a_real_pass_keeps(changes: dict[str, object]) -> None:
    config = small_config(**changes)
    found = training_footprint(config, 128, 128)
    assert found is not None
    assert found.kept_bytes == pytest.approx(kept_by(config, 128), rel=0.1)


def test_footprint_grows_with_the_area() -> None:
    small_one, large = (training_footprint(small_config(), side, side) for side in (128, 256))
    assert small_one is not None
    assert large is not None
    assert large.kept_bytes / small_one.kept_bytes == pytest.approx(4, rel=0.35)
    assert large.operations / small_one.operations == pytest.approx(4, rel=0.35)


def test_footprint_of_checkpointed_and_frozen_parts_is_smaller() -> None:
    whole = training_footprint(small_config(enc_layers=3), 128, 128)
    checkpointed = training_footprint(small_config(enc_layers=3, checkpoint_encoder=True), 128, 128)
    frozen = training_footprint(small_config(enc_layers=3, freeze=("backbone",), init_from="run"), 128, 128)
    assert whole is not None
    assert checkpointed is not None
    assert frozen is not None
    assert checkpointed.kept_bytes < whole.kept_bytes
    assert frozen.kept_bytes < whole.kept_bytes


def test_footprint_of_a_detector_that_needs_the_ground_truth_is_none() -> None:
    assert training_footprint(ModelConfig(name="faster_rcnn"), 128, 128) is None
