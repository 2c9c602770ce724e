"""Model and criterion combined into the one module that a backend runs. Raises what they raise."""

from dataclasses import dataclass, field

import torch
from torch import nn

from pipeline.config import Precision
from pipeline.data.batch import Batch
from pipeline.engine.precision import DTYPES
from pipeline.model import Detector, OwnLosses, SetCriterion


@dataclass(frozen=True)
class StepNorm:
    """The divisors of the losses: counts of the whole step over all ranks, float scalars on the device."""

    num_boxes: torch.Tensor  # ground-truth boxes, at least 1
    groups: torch.Tensor  # pad groups without those of weight 0
    # Ranks that were asked to stop; they share this all-reduce, so that none is spent on them.
    stops: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


class LossModule(nn.Module):
    """Model and criterion as one module with a single forward, which contains autocast."""

    def __init__(self, model: Detector, criterion: SetCriterion | OwnLosses, precision: Precision = "fp32") -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self._dtype = DTYPES[precision]

    def forward(self, batch: Batch, norm: StepNorm) -> dict[str, torch.Tensor]:
        """Unweighted losses of one pad group, which add up to those of the whole step."""
        with torch.autocast(batch.images.device.type, self._dtype, enabled=self._dtype is not None):
            targets = batch.targets if self.model.takes_targets else None
            outputs = self.model(batch.images, batch.mask, targets)
        losses: dict[str, torch.Tensor] = self.criterion(outputs, batch.targets, norm.num_boxes, norm.groups)
        return losses
