"""Low precision: the dtype for `train.precision`, the check that the device supports it, and fp16's loss scale.

The next scale is a function of the scale and of whether the gradient was finite. All ranks know both, so they agree
without communication. The scale is saved in the checkpoint's JSON state. A device without the precision is a
ConfigError.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import conv2d, linear

from pipeline.config import Precision
from pipeline.errors import ConfigError

DTYPES: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_GROWTH_STEPS = 2000  # finite steps in a row before the scale is doubled, as in torch.amp.GradScaler
_LARGEST_SCALE = 2.0**24


@dataclass(frozen=True)
class LossScale:
    """The factor of the loss before backward, so that small fp16 gradients do not become zero.

    torch.amp.GradScaler cannot be used: it unscales `.grad`, but ZeRO 1 to 3 keep gradients elsewhere.
    """

    scale: float = 2.0**16  # a power of two: scaling and unscaling are exact
    finite_steps: int = 0  # in a row

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller scale may avoid a non-finite gradient."""
        return self.scale > 1

    def after(self, finite: bool) -> "LossScale":
        """The scale for the next step, given whether this step's gradient was finite."""
        if not finite:
            return LossScale(max(1.0, self.scale / 2))
        if self.finite_steps + 1 < _GROWTH_STEPS:
            return replace(self, finite_steps=self.finite_steps + 1)
        return LossScale(min(_LARGEST_SCALE, self.scale * 2))


def initial_scale(precision: Precision) -> LossScale | None:
    """The scale at the start of a run; None for dtypes with the exponent range of fp32, which need no scale."""
    return LossScale() if precision == "fp16" else None


def check_precision(precision: Precision, device: torch.device) -> None:
    """Run the two operations that autocast uses in low precision, forward and backward.

    Raises:
        ConfigError: the device does not support them.
    """
    dtype = DTYPES[precision]
    if dtype is None:
        return
    try:
        image = torch.ones(1, 1, 2, 2, device=device, dtype=dtype, requires_grad=True)
        kernel = torch.ones(1, 1, 1, 1, device=device, dtype=dtype)
        found = linear(conv2d(image, kernel).flatten(1), torch.ones(1, 4, device=device, dtype=dtype))
        torch.autograd.backward(found.sum())
    except RuntimeError as error:
        raise ConfigError(
            f"train.precision={precision} does not work on {device} ({error}); use train.precision=fp32"
            + (" or bf16" if precision == "fp16" else "")
        ) from None
