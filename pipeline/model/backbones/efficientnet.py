"""EfficientNet B0 to B6 (arXiv 1905.11946) as a backbone: torchvision's without its last convolution and classifier.

Built by `backbone.build_backbone`, with the contract of all backbones. All of it trains, as in EfficientDet; only the
batch norms are frozen, whose statistics would tie the result to the pad groups.
"""

import torchvision
from torch import Tensor, nn

from pipeline.model.backbones.norms import FrozenBatchNorm2d, group_norm

LAST = (2, 3, 5, 7)  # the blocks of `features` that end the strides 4, 8, 16, 32


class EfficientNet(nn.Module):
    """Blocks of `body.features`, named as in torchvision."""

    strides = (8, 16, 32)

    def __init__(self, name: str, norm: str) -> None:
        """Build with random weights; `norm` as in `model.backbone.norm`."""
        super().__init__()
        # no stochastic depth: EfficientDet was trained without (its released settings)
        features = torchvision.models.get_model(name, weights=None, stochastic_depth_prob=0.0).features[: LAST[-1] + 1]
        _replace_batch_norms(features, norm)
        self.body = nn.ModuleDict({"features": features})
        self.pyramid_channels = tuple(features[block][-1].out_channels for block in LAST)
        self.channels = self.pyramid_channels[1:]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] -> C2, C3, C4, C5."""
        maps = [images]
        for block in self.body["features"].children():
            maps.append(block(maps[-1]))
        return [maps[block + 1] for block in LAST]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] -> C3, C4, C5."""
        return self.pyramid(images)[1:]


def _replace_batch_norms(module: nn.Module, norm: str) -> None:
    """In place; a frozen one keeps its epsilon, which is 1e-3 from B5 on."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = norm == "frozen_batch"
            setattr(
                module,
                name,
                FrozenBatchNorm2d(child.num_features, child.eps) if frozen else group_norm(child.num_features),
            )
        else:
            _replace_batch_norms(child, norm)
