"""Modulated deformable convolution (DCNv2, arXiv 1811.11168) as a replacement of a plain one.

The sampling is torchvision's `deform_conv2d`. On CUDA its backward has no fixed order of additions, so runs differ in
the last bits, and torch.use_deterministic_algorithms refuses it.
"""

from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from pipeline.model.layers import no_autocast

_TAPS = 9


class ModulatedDeformConv2d(nn.Module):
    """A 3x3 convolution; a second convolution predicts an offset and a weight of each tap at every pixel.

    The weight keeps its name, shape and groups, so weights of the plain convolution can be loaded. The second
    convolution starts at zero: no tap is moved, and each is weighted by sigmoid(0) as published. The initial output is
    half of the plain one's.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        """Use the weight and the geometry of `plain`: 3x3, padded by its dilation, no bias."""
        super().__init__()
        self.stride, self.dilation = plain.stride[0], plain.dilation[0]
        self.weight = plain.weight
        self.conv_offset = nn.Conv2d(plain.in_channels, 3 * _TAPS, 3, self.stride, self.dilation, self.dilation)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'] of the same type; float32 inside, because an offset is a coordinate."""
        with no_autocast(x):
            wide = x.to(self.weight.dtype)
            # (y, x) of each tap in pixels, then the logit of each tap's weight
            offsets, logits = self.conv_offset(wide).split([2 * _TAPS, _TAPS], dim=1)
            geometry = self.stride, self.dilation, self.dilation  # stride, padding, dilation
            out: Tensor = deform_conv2d(wide, offsets, self.weight, None, *geometry, mask=logits.sigmoid())
        return out.to(x.dtype)
