"""What is done to all weights at once before each forward pass: `train.fold_norms` and `train.cast_weights_once`.

Frozen batch norms become factors of the weights before them, so no layer computes them. Autocast casts every weight
where it is used and every gradient back, two launches for each; here one launch casts a list of weights, and one more
their gradients. The layers have the prepared tensors in the place of their parameters during a pass, and gradients
reach the parameters. Casting gives the same bits as autocast, folding the same numbers to rounding. Never fails.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # the output projection of MultiheadAttention

from pipeline.model import Detector
from pipeline.model.backbones.norms import FrozenBatchNorm2d

_LAYERS = (nn.Conv2d, nn.Linear, NonDynamicallyQuantizableLinear, nn.MultiheadAttention)  # what autocast casts


@dataclass
class _Fold:
    """A frozen norm behind a convolution."""

    conv: nn.Conv2d
    norm: FrozenBatchNorm2d
    constants: tuple[Tensor, Tensor] | None = None  # of the norm, when `factor` and `bias` were made
    factor: Tensor | None = None  # of every weight: of the convolution's shape, because lists of equal shapes are fast
    bias: Tensor | None = None

    def update(self, dtype: torch.dtype) -> None:
        """Make factor and bias, unless the norm's constants are the same as before."""
        constants = self.norm.constants(torch.float32)
        if constants is not self.constants:
            scale, shift = constants
            weight = self.conv.weight
            self.factor = torch.empty_like(weight).copy_(scale[:, None].expand_as(weight))
            self.bias, self.constants = shift.flatten().to(dtype), constants


class PreparedWeights:
    """The weights of a model that are replaced during a forward pass.

    Args:
        model: its `float32_parts` are not cast.
        dtype: of the casts; None casts nothing.
        fold: fold frozen norms into the convolutions before them.
    """

    def __init__(self, model: Detector, dtype: torch.dtype | None, fold: bool) -> None:
        self._dtype = dtype
        self._folds = [_Fold(*pair) for pair in _convolutions_with_norms(model)] if fold else []
        convs = {id(fold.conv) for fold in self._folds}
        folded: list[tuple[nn.Module, str]] = [(fold.conv, "weight") for fold in self._folds]
        cast: list[tuple[nn.Module, str]] = [
            (module, name)
            for path, module in model.named_modules()
            if dtype and type(module) in _LAYERS and not set(model.float32_parts) & set(path.split("."))
            for name, _ in module.named_parameters(recurse=False)
            if id(module) not in convs
        ]
        self._owners = folded + cast

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the layers have the prepared tensors in the place of their parameters."""
        parameters = [module.get_parameter(name) for module, name in self._owners]
        for fold in self._folds:
            fold.update(self._dtype or torch.float32)
        factors = [fold.factor for fold in self._folds]
        prepared = _Prepare.apply(self._dtype, factors, *parameters)
        # not by setattr, which refuses a tensor that is no parameter
        for (module, name), tensor in zip(self._owners, prepared, strict=True):
            module._parameters[name] = tensor
        for fold in self._folds:
            fold.conv._parameters["bias"], fold.norm.folded = fold.bias, True  # type: ignore[assignment]  # see above
        try:
            yield
        finally:
            for (module, name), parameter in zip(self._owners, parameters, strict=True):
                module._parameters[name] = parameter
            for fold in self._folds:
                fold.conv._parameters["bias"], fold.norm.folded = None, False


def _convolutions_with_norms(model: nn.Module) -> Iterator[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    """Each frozen norm whose module lists it after a convolution without bias, as all backbones here do."""
    for module in model.modules():
        for conv, norm in pairwise(module.children()):
            if type(conv) is nn.Conv2d and conv.bias is None and isinstance(norm, FrozenBatchNorm2d):
                yield conv, norm


class _Prepare(torch.autograd.Function):
    """Multiplies the first tensors by constant factors, then casts all; the same with the gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype | None, factors: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(factors)
        made = [*(torch._foreach_mul(tensors[:count], factors) if count else ()), *tensors[count:]]
        if dtype is not None:
            made = _copy_as(made, dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(m for m, t in zip(made, tensors, strict=True) if not t.requires_grad))
        ctx.factors = factors
        ctx.dtype = None if dtype is None else tensors[0].dtype
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [number for number, grad in enumerate(grads) if grad is not None]
        made = [grad for grad in grads if grad is not None]
        if ctx.dtype is not None:
            made = _copy_as(made, ctx.dtype)
        count = sum(number < len(ctx.factors) for number in given)
        if count:
            made[:count] = torch._foreach_mul(made[:count], [ctx.factors[number] for number in given[:count]])
        found: list[Tensor | None] = [None] * len(grads)
        for number, grad in zip(given, made, strict=True):
            found[number] = grad
        return None, None, *found


def _copy_as(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies
