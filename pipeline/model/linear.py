"""`nn.Linear`, on a CPU as a 1x1 convolution. Used by the attention modules, the layers and the heads.

torch sends float32 matrix products to MKL, which leaves half of an AMD core unused, but convolutions to oneDNN, which
does not: twice as fast at this model's shapes on Zen 5 (`benchmarks.linear`). The weights, their names and the result
to rounding are those of `nn.Linear`.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

LEAST = 20480  # numbers in the input; torch keeps smaller convolutions away from oneDNN


class Linear(nn.Linear):
    """x [..., in_features] -> x W^T + b [..., out_features]."""

    def forward(self, x: Tensor) -> Tensor:
        """The product, by oneDNN where torch would choose MKL."""
        return pointwise(x, self.weight, self.bias) if _suits(x, self.weight) else super().forward(x)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X [..., in_features] -> [..., out_features], over rows seen as one image, channels last: nothing is copied.

    The dilation means nothing to one tap, but with it torch takes oneDNN for a single thread, too.
    """
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    product = conv2d(image, weight[:, :, None, None], bias, dilation=2)
    return product.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _suits(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a compiler or an exporter shall see the product as what it is, for any size
        return False
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > LEAST
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )
