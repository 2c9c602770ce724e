"""Builds the backbone of a config, and defines a small one for small data.

A backbone has `channels` (of the maps it returns), `strides`, and `forward(images [N, 3, H, W]) -> [C3, C4, C5]`.
`pyramid` and `pyramid_channels` also include C2, which Faster R-CNN needs. Conv5 and ResNet accept the images'
`valid_pixels` (`model.norm_valid`): their maps are then zero in the padding and do not depend on it. Settings that do
not fit together are a ConfigError, weights that cannot be read a CheckpointError.
"""

from torch import Tensor, nn

from pipeline.config import BackboneConfig
from pipeline.model.backbones.efficientnet import EfficientNet
from pipeline.model.backbones.norms import NORMS, subsample
from pipeline.model.backbones.resnet import ResNet
from pipeline.model.backbones.weights import load_backbone_weights


class Conv5(nn.Module):
    """Five stages of two 3x3 convolutions, the first of stride 2: for images of about 160 px, trained from scratch."""

    strides = (8, 16, 32)

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 8 * width, 8 * width)
        self.pyramid_channels, self.channels = widths[1:], widths[2:]
        stages, before = [], 3
        for after in widths:
            stages.append(
                nn.Sequential(_conv_norm_relu(before, after, 2, norm), _conv_norm_relu(after, after, 1, norm))
            )
            before = after
        self.stages = nn.ModuleList(stages)

    def pyramid(self, images: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """Images [N, 3, H, W], and optionally their valid pixels [N, 1, H, W] -> C2, C3, C4, C5."""
        maps, x = [], images
        for stage in self.stages:
            valid = subsample(valid)
            for block in stage.children():
                conv, norm, relu = block.children()
                x = relu(norm(conv(x), valid))
            maps.append(x)
        return maps[1:]

    def forward(self, images: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """As `pyramid` -> C3, C4, C5."""
        return self.pyramid(images, valid)[1:]


def _conv_norm_relu(before: int, after: int, stride: int, norm: str) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, NORMS[norm](after), nn.ReLU(inplace=True))


def build_backbone(config: BackboneConfig, load: bool = True) -> ResNet | EfficientNet | Conv5:
    """Build the backbone and load its initial weights; on every rank, because DeepSpeed does not broadcast buffers.

    Args:
        config: the `model.backbone` section.
        load: False ignores `config.weights`, for a model that is filled from a checkpoint.

    Raises:
        ConfigError: this backbone or norm does not accept the weights.
        CheckpointError: weights cannot be downloaded or read, or do not fit.
    """
    if config.name == "conv5":
        backbone: ResNet | EfficientNet | Conv5 = Conv5(config.width, config.norm)
    elif config.name.startswith("efficientnet"):
        backbone = EfficientNet(config.name, config.norm)
    else:
        backbone = ResNet(config)
    if load:
        load_backbone_weights(backbone if isinstance(backbone, Conv5) else backbone.body, config)
    return backbone
