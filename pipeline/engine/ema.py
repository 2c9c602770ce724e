"""An exponential moving average of the weights (`train.ema_decay`). If it is on, it is evaluated and registered.

It is updated after every applied optimizer step. Each rank keeps the whole average in fp32, because evaluation needs it
on every rank. It is computed from the rank's own parameters, which are whole and equal on all ranks under ZeRO 0 to 2.
So an update costs one pass over the weights and no communication. A stored average that does not fit the model is a
CheckpointError.
"""

import copy

import torch
from torch import Tensor, nn

from pipeline.checkpoint import restore_weights


class WeightAverage:
    """A second model, in eval mode and without gradients, whose parameters follow those of the trained one.

    Args:
        model: the trained model, with the weights that the average starts from.
        decay: share of the average that stays in each update, once warmed up.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move parameters towards those of `model` and copy its buffers, which are statistics and constants.

        Args:
            model: the trained model, after its update.
            step: optimizer steps that have been applied to it, this one included.
        """
        weight = 1 - decay_at(step, self._decay)
        # Not swa_utils.AveragedModel: its counter is a tensor, and reading it waits for the GPU in every step.
        torch._foreach_lerp_([*self.model.parameters()], [*model.parameters()], weight)
        for own, given in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(given)


def start_average(model: nn.Module, decay: float, stored: dict[str, Tensor] | None) -> WeightAverage | None:
    """The average of a run that starts or continues; None if `decay` is 0.

    Args:
        model: with its initial or restored weights; without a stored average, it starts from these.
        decay: `train.ema_decay`.
        stored: the average in the checkpoint, None if there is no checkpoint or none in it.
    """
    if not decay:
        return None
    average = WeightAverage(model, decay)
    if stored is not None:
        restore_weights(average.model, stored)
    return average


def decay_at(step: int, decay: float) -> float:
    """The decay in effect at a step: min(decay, (1 + step) / (10 + step)), TensorFlow's `num_updates` rule.

    While it rises, the average spans the last ninth of the training so far. So the random start is forgotten at any
    decay, and no warm-up length must be chosen. It depends only on the step, so a checkpoint need not hold it.
    """
    return min(decay, (1 + step) / (10 + step))
