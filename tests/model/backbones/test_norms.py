"""Norms that do not depend on the batch: frozen batch norm against torch's, and groups for every width."""

import pytest
import torch

from pipeline.model.backbones.norms import FrozenBatchNorm2d, group_norm


def test_group_norm_groups_have_four_channels() -> None:
    assert [group_norm(c).num_groups for c in (8, 12, 32, 64, 128, 2048)] == [2, 1, 8, 16, 32, 32]


@pytest.mark.parametrize("channels", range(1, 65))
def test_group_norm_groups_divide_any_width(channels: int) -> None:
    assert group_norm(channels)(torch.randn(2, channels, 3, 3)).isfinite().all()


def test_frozen_batch_norm_equals_batch_norm_in_evaluation() -> None:
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(6).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(norm.running_var, 0.1, 2)
    frozen = FrozenBatchNorm2d(6)
    frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"})
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(frozen(x), norm(x))
    assert not list(frozen.parameters())
    assert frozen(x.bfloat16()).dtype == torch.bfloat16


def test_frozen_batch_norm_in_training_follows_changed_buffers() -> None:
    """The factors are kept between calls; a buffer that changes in place or is replaced makes new ones."""
    kept, fresh = FrozenBatchNorm2d(3).train(), FrozenBatchNorm2d(3).eval()
    x = torch.randn(1, 3, 2, 2)
    assert torch.equal(kept(x), fresh(x))
    assert kept.constants(torch.float32) is kept.constants(torch.float32)
    for norm in (kept, fresh):
        norm.running_var.mul_(4)
    assert torch.equal(kept(x), fresh(x))
    for norm in (kept, fresh):
        norm.weight = torch.full((3,), 2.0)
    assert torch.equal(kept(x), fresh(x))
    assert torch.equal(kept(x.bfloat16()), fresh(x.bfloat16()))
