"""torchvision's ResNets and ResNeXts as backbones, with freezing as published, dilation (DC5) and DCN.

The keys below `body` are torchvision's, so that its weights and the published ones can be loaded.
"""

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from pipeline.config import BackboneConfig
from pipeline.model.backbones.deform_conv import ModulatedDeformConv2d
from pipeline.model.backbones.norms import NORMS, subsample


class ResNet(nn.Module):
    """A residual network without its classifier, under its torchvision name.

    With frozen batch norm the stem and layer1 are frozen as published; with group norm everything trains.
    """

    pyramid_channels = (256, 512, 1024, 2048)
    channels = pyramid_channels[1:]

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.body = torchvision.models.get_model(
            config.name,
            weights=None,
            norm_layer=NORMS[config.norm],
            replace_stride_with_dilation=[False, False, config.dilation],
        )
        del self.body.fc, self.body.avgpool
        self.strides = (8, 16, 16 if config.dilation else 32)
        if config.deformable_conv:
            for stage in (self.body.layer2, self.body.layer3, self.body.layer4):
                for block in stage:
                    block.conv2 = ModulatedDeformConv2d(block.conv2)
        if config.norm == "frozen_batch":
            for part in (self.body.conv1, self.body.layer1):
                part.requires_grad_(False)

    def pyramid(self, images: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """Images [N, 3, H, W], and optionally their valid pixels [N, 1, H, W] -> C2, C3, C4, C5."""
        if valid is not None:
            return self._valid_pyramid(images, valid)
        body = self.body
        c2 = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(images)))))
        c3 = body.layer2(c2)
        c4 = body.layer3(c3)
        return [c2, c3, c4, body.layer4(c4)]

    def _valid_pyramid(self, images: Tensor, valid: Tensor) -> list[Tensor]:
        """The same, with zeros in the padding after every layer."""
        body = self.body
        valid = subsample(valid)
        x = body.maxpool(body.relu(body.bn1(body.conv1(images), valid)))
        valid = subsample(valid)
        x = x * valid  # a window beyond the edge overlaps the image
        maps: list[Tensor] = []
        before = 4
        for stage, stride in zip((body.layer1, body.layer2, body.layer3, body.layer4), (4, *self.strides), strict=True):
            for block in stage:
                inner, valid = valid, subsample(valid, stride // before)
                x, before = _valid_block(block, x, inner, valid), stride
            maps.append(x)
        return maps

    def forward(self, images: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """As `pyramid` -> C3, C4, C5."""
        return self.pyramid(images, valid)[1:]


def _valid_block(block: Bottleneck, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Torchvision's residual block, with the valid pixels of its input and of its output."""
    out = block.relu(block.bn1(block.conv1(x), before))
    out = block.relu(block.bn2(block.conv2(out), after))
    out = block.bn3(block.conv3(out), after)
    if block.downsample is not None:
        conv, norm = block.downsample
        x = norm(conv(x), after)
    summed: Tensor = block.relu(out + x)
    return summed
