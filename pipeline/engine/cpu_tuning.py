"""What makes models faster on a device and changes nothing but rounding.

On a CPU there are two parts, and `train.cpu_tuning: false` turns them off: linear layers that run as convolutions, and
an environment in which the C library keeps freed memory. `train.channels_last` and `train.expandable_segments` are for
GPUs. All are applied from outside to a model or a process.
"""

import os

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from pipeline.config import TrainConfig
from pipeline.csrc.kernels import VARIABLE

# Set before a process starts. The C library would give every tensor of more than 32 MiB back to the kernel, and get it
# again page by page and zeroed: a quarter of the step at 800x1333 (`benchmarks.model`), for no lower peak. There is one
# arena because the others never keep such blocks.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
MIN_INPUT_NUMBERS = 20480  # torch keeps smaller convolutions away from oneDNN
# Layers that ran untuned in earlier versions; left so, because a resumed run must get the same bits.
UNTUNED = {"reference_points", "pos_trans", "roi_heads"}


def process_environment(train: TrainConfig, use_gpu: bool) -> dict[str, str]:
    """Environment variables for a training process; they only work if they are set before it starts."""
    if use_gpu:
        kernels = {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}
        return kernels | ({ALLOCATOR: "expandable_segments:True"} if train.expandable_segments else {})
    return KEEP_FREED_MEMORY if train.cpu_tuning else {}


def tune_model(model: nn.Module, train: TrainConfig, device: torch.device) -> None:
    """Let a model's linear layers run as convolutions, on a CPU with `train.cpu_tuning`.

    Weights, their names and the modules stay the same objects; only the class of the layers changes. With
    `train.channels_last` the backbone's weights change their layout in memory, on any device.
    """
    if train.channels_last:
        use_channels_last(model)
    if not train.cpu_tuning or device.type != "cpu":
        return
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and not UNTUNED.intersection(name.split(".")):
            layer.__class__ = ConvolutionLinear


def use_channels_last(model: nn.Module) -> None:
    """Let the backbone's weights have their input channels as the innermost axis, and so its maps, too."""
    model.get_submodule("backbone").to(memory_format=torch.channels_last)


class ConvolutionLinear(nn.Linear):
    """`nn.Linear` that multiplies by a 1x1 convolution where this is faster: x [..., in] -> x W^T + b [..., out].

    torch sends float32 matrix products to MKL, which leaves half of an AMD core unused. It sends convolutions to
    oneDNN, which does not: twice as fast at the shapes of the transformer on Zen 5 (`benchmarks.linear`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """The product, by oneDNN where torch would choose MKL."""
        return _as_convolution(x, self.weight, self.bias) if _suits(x, self.weight) else super().forward(x)


def _as_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X [..., in] -> [..., out], with the rows seen as one image in channels-last layout: nothing is copied.

    The dilation means nothing to a 1x1 kernel, but with it torch chooses oneDNN for a single thread, too.
    """
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    product = conv2d(image, weight[:, :, None, None], bias, dilation=2)
    return product.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _suits(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a compiler or an exporter must see a linear layer, for any size
        return False
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > MIN_INPUT_NUMBERS
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch gives it no types
        and not torch.is_autocast_enabled("cpu")
    )
