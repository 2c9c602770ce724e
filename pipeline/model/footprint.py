"""Memory and arithmetic of a training step from the shapes alone: the model runs on torch's meta device, in a second.

Counted are the tensors that autograd keeps for the backward pass, in fp32, and the operations of the forward pass.
Detectors that sample from the ground truth in training cannot run without pixels and give None.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pipeline.model.flops  # noqa: F401  # registers the formulas of this project's operators
from pipeline.config import ModelConfig
from pipeline.model.build import build_model


@dataclass(frozen=True)
class Footprint:
    """Of one image in training."""

    kept_bytes: int  # for the backward pass, in fp32
    operations: float  # floating-point operations of the forward pass; a multiply-add counts as two


def training_footprint(config: ModelConfig, height: int, width: int) -> Footprint | None:
    """The footprint of an image of `height` x `width` pixels; None for a detector that needs the ground truth.

    Args:
        config: the `model` section, with a number of classes; weights are not read.
        height: after augmentation.
        width: the same.
    """
    with torch.device("meta"):
        model = build_model(config, load_backbone=False).train()
        if model.takes_targets:
            return None
        images, mask = torch.zeros(1, 3, height, width), torch.zeros(1, height, width, dtype=torch.bool)
    weights = {_place(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors are held, so that no place is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[_place(tensor)] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    # The fused attention kernels do not have a formula on every device; the math backend is two products.
    with hooks, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, mask)
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    return Footprint(total, float(counter.get_total_flops()))


def _place(tensor: Tensor) -> int:
    """What tensors over the same memory share; on the meta device there are no addresses."""
    return int(tensor.untyped_storage()._cdata)
