"""Model and criterion combined into the one module that a backend runs. Raises what they raise."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from pipeline.config import Precision
from pipeline.data.batch import Batch
from pipeline.engine.precision import DTYPES
from pipeline.engine.prepared import PreparedWeights
from pipeline.model import Detector, OwnLosses, SetCriterion


@dataclass(frozen=True)
class StepNorm:
    """The divisors of the losses: counts of the whole step over all ranks, float scalars on the device."""

    num_boxes: torch.Tensor  # ground-truth boxes, at least 1
    groups: torch.Tensor  # pad groups without those of weight 0
    # Ranks that were asked to stop; they share this all-reduce, so that none is spent on them.
    stops: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


class LossModule(nn.Module):
    """Model and criterion as one module with a single forward, which contains autocast.

    Args:
        model: any detector.
        criterion: its losses.
        precision: `train.precision`.
        cast_once: `train.cast_weights_once`; means nothing in fp32.
        fold_norms: `train.fold_norms`.
    """

    def __init__(
        self,
        model: Detector,
        criterion: SetCriterion | OwnLosses,
        precision: Precision = "fp32",
        cast_once: bool = False,
        fold_norms: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self._dtype = DTYPES[precision]
        dtype = self._dtype if cast_once else None
        self._weights = PreparedWeights(model, dtype, fold_norms) if dtype or fold_norms else None

    def forward(self, batch: Batch, norm: StepNorm) -> dict[str, torch.Tensor]:
        """Unweighted losses of one pad group, which add up to those of the whole step."""
        weights = self._weights.applied() if self._weights else nullcontext()
        with weights, torch.autocast(batch.images.device.type, self._dtype, enabled=self._dtype is not None):
            targets = batch.targets if self.model.takes_targets else None
            outputs = self.model(batch.images, batch.mask, targets)
        losses: dict[str, torch.Tensor] = self.criterion(outputs, batch.targets, norm.num_boxes, norm.groups)
        return losses
