"""The batch arithmetic: how a global batch becomes pad groups, and pad groups become passes of ranks.

`global_batch` and `micro_batch` (the pad group) are settings and part of the recipe; accumulation follows from the
world size. Pure; never fails.
"""

import math
from dataclasses import dataclass

from pipeline.config import ModelConfig, OptimConfig, TrainConfig

# (model.name, optim.lr, optim.backbone_lr) of the published recipes -> the global batch that these rates are for
RECIPES = {("deformable_detr", 2e-4, 2e-5): 32, ("detr", 1e-4, 1e-5): 64}


@dataclass(frozen=True)
class BatchArithmetic:
    """One optimizer step on `world` ranks."""

    global_batch: int  # samples
    micro_batch: int  # samples padded together
    world: int

    @property
    def groups(self) -> int:
        """Pad groups of the step."""
        return self.global_batch // self.micro_batch

    @property
    def passes(self) -> int:
        """Forward and backward passes of every rank: the accumulation. A rank with too few groups repeats one."""
        return math.ceil(self.groups / self.world)

    @property
    def idle(self) -> int:
        """Passes of all ranks that repeat a group with weight 0, because the world size does not divide the groups."""
        return self.passes * self.world - self.groups

    def __str__(self) -> str:
        text = (
            f"{self.global_batch} images = {self.groups} pad groups of {self.micro_batch}; "
            f"{self.world} ranks x {self.passes} groups each"
        )
        if not self.idle:
            return text
        return f"{text}, {self.idle} of them with weight 0 ({self.idle / (self.passes * self.world):.0%} of the work)"


def batch_arithmetic(train: TrainConfig, world: int) -> BatchArithmetic:
    """The arithmetic of a run's steps at a world size."""
    return BatchArithmetic(train.global_batch, train.pad_group, world)


def recipe_warning(model: ModelConfig, optim: OptimConfig, train: TrainConfig) -> str:
    """What to do about published learning rates at another batch than theirs; empty if they are not used or fit.

    Adam's update does not grow with the gradient, so rates follow the square root of the batch (arXiv 2205.10287)
    rather than the batch itself. With unchanged rates 64 images gave 43.5 AP where 32 gave 44.1 and 44.3 (issue 14
    of the released code).
    """
    batch = RECIPES.get((model.name, optim.lr, optim.backbone_lr))
    trained_from_nothing = model.backbone.weights == "none"  # not the published model
    if batch is None or batch == train.global_batch or trained_from_nothing or optim.batch:
        return ""
    ratio = train.global_batch / batch
    text = (
        f"train.global_batch is {train.global_batch}, but optim.lr={optim.lr:g} and "
        f"optim.backbone_lr={optim.backbone_lr:g} were published for {batch}, so the published AP is not to be "
        f"expected. Start from both rates times {math.sqrt(ratio):.2g}, the square root of {ratio:.3g}: with Adam "
        "they do not scale linearly"
    )
    return f"{text}; let them rise over optim.warmup_steps=500 or more" if ratio > 1 else text
