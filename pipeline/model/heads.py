"""The heads of the transformer detectors, from a query's features to scores and a box."""

import math

from torch import Tensor, nn

_PRIOR = 0.01  # initial probability of every class (focal loss, arXiv 1708.02002)


class MLP(nn.Module):
    """Three linear layers with ReLU between them: the box head."""

    def __init__(self, hidden_dim: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden_dim, width) for width in (hidden_dim, hidden_dim, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_dim] -> [..., outputs]."""
        x = self.layers[1](self.layers[0](x).relu())
        out: Tensor = self.layers[2](x.relu())
        return out


def sigmoid_head(hidden_dim: int, classes: int) -> nn.Linear:
    """A logit per class, for the focal loss; every class starts with probability _PRIOR."""
    head = nn.Linear(hidden_dim, classes)
    nn.init.constant_(head.bias, -math.log((1 - _PRIOR) / _PRIOR))
    return head


def softmax_head(hidden_dim: int, classes: int) -> nn.Linear:
    """A logit per class and a last one for "no object", for cross entropy (arXiv 2005.12872)."""
    return nn.Linear(hidden_dim, classes + 1)


def delta_head(hidden_dim: int) -> MLP:
    """A box head whose initial output is zero, so that boxes start at their reference."""
    head = MLP(hidden_dim, 4)
    nn.init.zeros_(head.get_parameter("layers.2.weight"))
    nn.init.zeros_(head.get_parameter("layers.2.bias"))
    return head
