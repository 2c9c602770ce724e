"""Convolutional trunks: ResNet with the published freezing, and a five-stage one for small data. Used by the detector.

A backbone has `channels` (of the maps it returns), `strides`, and `forward(images [N, 3, H, W]) -> [C3, C4, C5]`;
`pyramid` and `pyramid_channels` are the same with C2 before them, which Faster R-CNN needs. It fails with ConfigError
for a combination that makes no sense, CheckpointError where weights cannot be read.
"""

from functools import partial
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import BackboneConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model import efficientnet
from pipeline.model.norms import NORMS
from pipeline.model.weights import load_strict


class ResNet(nn.Module):
    """torchvision's ResNet-50 or -101 without its classifier.

    With frozen batch norm the stem and layer1 are frozen as published; with group norm everything trains.
    """

    pyramid_channels = (256, 512, 1024, 2048)
    channels = pyramid_channels[1:]
    strides = (8, 16, 32)

    def __init__(self, name: str, norm: str) -> None:
        super().__init__()
        make = {"resnet50": torchvision.models.resnet50, "resnet101": torchvision.models.resnet101}[name]
        self.body = make(weights=None, norm_layer=NORMS[norm])
        del self.body.fc, self.body.avgpool
        if norm == "frozen_batch":
            for part in (self.body.conv1, self.body.layer1):
                part.requires_grad_(False)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] -> C2, C3, C4, C5."""
        body = self.body
        c2 = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(images)))))
        c3 = body.layer2(c2)
        c4 = body.layer3(c3)
        return [c2, c3, c4, body.layer4(c4)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] -> C3, C4, C5."""
        return self.pyramid(images)[1:]


class Conv5(nn.Module):
    """Five stages of two 3x3 convolutions, the first of stride 2: for images of about 160 px, trained from nothing."""

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

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] -> C2, C3, C4, C5."""
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[2:]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] -> C3, C4, C5."""
        return self.pyramid(images)[1:]


def _conv_norm_relu(before: int, after: int, stride: int, norm: str) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, NORMS[norm](after), nn.ReLU(inplace=True))


Backbone = ResNet | Conv5 | efficientnet.EfficientNet


def build_backbone(config: BackboneConfig, load: bool = True) -> Backbone:
    """Build the trunk and give it its starting weights (on every rank: DeepSpeed broadcasts no buffers).

    Args:
        config: the `model.backbone` section.
        load: False skips `config.weights`, for a model whose weights come from a checkpoint anyway.

    Raises:
        ConfigError: weights that this trunk or norm cannot take.
        CheckpointError: weights that cannot be downloaded, read, or do not fit.
    """
    if config.name == "conv5":
        if load and config.weights == "imagenet":
            raise ConfigError("model.backbone.name=conv5 has no ImageNet weights; set model.backbone.weights=none")
        backbone: Backbone = Conv5(config.width, config.norm)
    else:
        if load and config.weights == "imagenet" and config.norm == "group":
            raise ConfigError(
                "ImageNet weights were trained with batch norm; set model.backbone.norm=frozen_batch, or "
                "model.backbone.weights=none to train from nothing"
            )
        efficient = config.name in efficientnet.MODELS
        backbone = (efficientnet.EfficientNet if efficient else ResNet)(config.name, config.norm)
    if load and config.weights != "none":
        tensors = _imagenet(config.name) if config.weights == "imagenet" else _read(Path(config.weights))
        body = backbone if isinstance(backbone, Conv5) else backbone.body
        ignore = ("fc.", *efficientnet.UNUSED)
        kept = {k: v for k, v in tensors.items() if not k.startswith(ignore) and not k.endswith("num_batches_tracked")}
        load_strict(body, kept, f"model.backbone.weights={config.weights}")
    return backbone


def _imagenet(name: str) -> dict[str, Tensor]:
    """The IMAGENET1K_V1 weights of torchvision, those of the paper; downloaded once into torch's hub cache."""
    names = {"resnet50": torchvision.models.ResNet50_Weights, "resnet101": torchvision.models.ResNet101_Weights}
    names |= {key: weights for key, (_, weights) in efficientnet.MODELS.items()}
    weights = names[name].IMAGENET1K_V1
    try:
        tensors: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise CheckpointError(
            f"cannot download the ImageNet weights ({error}). Fetch {weights.url} on a machine with network access and "
            f"place it in {folder} of every node, or set model.backbone.weights=PATH or model.backbone.weights=none"
        ) from error
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    read = load_file if path.suffix == ".safetensors" else partial(torch.load, map_location="cpu", weights_only=True)
    try:
        tensors = read(path)
    except Exception as error:  # the readers raise a dozen types for damaged files, and none names the setting
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"model.backbone.weights: cannot read {path}: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"model.backbone.weights: {path} must hold a flat state_dict of tensors")
    return tensors
