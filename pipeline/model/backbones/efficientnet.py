"""EfficientNet B0 to B6 (arXiv 1905.11946) as a backbone: torchvision's without its last convolution and classifier.

All of it trains, as in EfficientDet, except the batch norms: they are frozen, because their statistics would make the
result depend on the pad groups.
"""

import torchvision
from torch import Tensor, nn

from pipeline.model.backbones.norms import FrozenBatchNorm2d, group_norm

LAST_BLOCKS = (2, 3, 5, 7)  # the last blocks of `features` at the strides 4, 8, 16, 32


class EfficientNet(nn.Module):
    """Blocks of `body.features`, named as in torchvision."""

    strides = (8, 16, 32)

    def __init__(self, name: str, norm: str) -> None:
        """Build with random weights; `norm` as in `model.backbone.norm`."""
        super().__init__()
        # without stochastic depth, as in EfficientDet's released settings
        features = torchvision.models.get_model(name, weights=None, stochastic_depth_prob=0.0).features[
            : LAST_BLOCKS[-1] + 1
        ]
        _replace_batch_norms(features, norm)
        self.body = nn.ModuleDict({"features": features})
        self.pyramid_channels = tuple(features[block][-1].out_channels for block in LAST_BLOCKS)
        self.channels = self.pyramid_channels[1:]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] -> C2, C3, C4, C5."""
        maps = [images]
        for block in self.body["features"].children():
            maps.append(block(maps[-1]))
        return [maps[block + 1] for block in LAST_BLOCKS]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] -> C3, C4, C5."""
        return self.pyramid(images)[1:]


def _replace_batch_norms(module: nn.Module, norm: str) -> None:
    """Replace batch norms in place; frozen ones keep their epsilon, which is 1e-3 from B5 on."""
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
