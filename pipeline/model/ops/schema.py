"""The operators' registration with torch: schemas, output shapes for compilers and exporters, derivatives.

Importing this module registers them. The libraries only add kernels to these names, so they may be loaded later or
never. There is no second derivative: computing one raises OpError.

All operators are functional. `spatial_shapes` is H0, W0, H1, W1, ... on the host: no synchronisation, and the sizes
reach a CUDA kernel as arguments. Absolute coordinates (locations, references) and the plain operator's weights are of
the accumulation type: fp64 for fp64, else fp32; offsets and logits are both of value's type, or both of that type. The
backward returns an empty tensor for each gradient that is not `wanted`. `..._backward_ordered`, on CUDA, gives the same
bits every time, several times slower; `torch.use_deterministic_algorithms` selects it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import OpError

_LIBRARY = torch.library.Library("deformable_detr", "DEF")
_INPUTS = {
    "ms_deform_attn": ("value", "sampling_locations", "attention_weights"),
    "ms_deform_attn_fused": ("value", "reference_points", "offsets", "logits"),
}


def has_kernel(name: str, device: str) -> bool:
    """Whether a library with kernels of operator `name` for `device` (cpu, cuda) is loaded."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"deformable_detr::{name}", device.upper())


def _output_shape(value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty(value.shape[0], rest[0].shape[1], value.shape[2] * value.shape[3])


def _gradient_shapes(grad_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, _, wanted = rest
    return tuple(t.new_empty(t.shape if want else (0,)) for t, want in zip(inputs, wanted, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.shapes = inputs
    ctx.save_for_backward(*tensors)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise OpError("ms_deform_attn has no second derivative; use impl='torch' (model.op=torch) for one")


def _register(name: str, inputs: Sequence[str]) -> None:
    tensors = ", ".join(f"Tensor {each}" for each in inputs)
    results = ", ".join(["Tensor"] * len(inputs))
    _LIBRARY.define(f"{name}({tensors}, SymInt[] spatial_shapes) -> Tensor")
    arguments = f"(Tensor grad_output, {tensors}, SymInt[] spatial_shapes, bool[] wanted) -> ({results})"
    backward_name, ordered_name = f"{name}_backward", f"{name}_backward_ordered"
    _LIBRARY.define(backward_name + arguments)
    _LIBRARY.define(ordered_name + arguments)

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[: len(inputs)])
        # on CUDA the plain one accumulates grad_value in the order of the threads; on the CPU the order is fixed
        ordered = grad_output.is_cuda and torch.are_deterministic_algorithms_enabled()
        operator = getattr(torch.ops.deformable_detr, ordered_name if ordered else backward_name)
        grads = operator(grad_output, *ctx.saved_tensors, ctx.shapes, wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None

    forward_name = f"deformable_detr::{name}"
    torch.library.register_fake(forward_name, _output_shape, lib=_LIBRARY)
    torch.library.register_autograd(forward_name, backward, setup_context=_save, lib=_LIBRARY)
    for each in (backward_name, ordered_name):
        torch.library.register_fake(f"deformable_detr::{each}", _gradient_shapes, lib=_LIBRARY)
        torch.library.register_autograd(f"deformable_detr::{each}", _no_second_derivative, lib=_LIBRARY)


for _name, _tensors in _INPUTS.items():
    _register(_name, _tensors)
