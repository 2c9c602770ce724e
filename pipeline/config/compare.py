"""Which settings two runs must share: to be one run that goes on (`--resume`), or to be the same recipe (`jobs.table`).

A prefix that ends with a dot stands for a section. Settings that choose where and how the same numbers are computed are
in neither list, and neither is what only the start of a run reads.
"""

from typing import Any

from pipeline.config.load import flatten
from pipeline.config.root import Config

# the same numbers, to rounding
NEUTRAL = ("model.op", "model.checkpoint_encoder", "model.merge_layers", "evaluation.where", "evaluation.task_minutes")
START = ("model.init_from", "model.backbone.weights")  # read before the first step, from then on the checkpoint counts
# What the order of samples, the weights, and what an AP is measured by depend on: one history has APs of one measure.
RESUME = ("seed", "model.", "data.labels", "data.mix_shards", "data.window", "data.pad_multiple", "data.tail",
          "data.balance", "data.augment.", "train.global_batch", "train.micro_batch", "evaluation.")  # fmt: skip
# What the AP after the last epoch depends on, besides chance.
RECIPE = ("model.", "loss.", "optim.", "data.labels", "data.pad_multiple", "data.balance", "data.augment.",
          "train.epochs", "train.max_steps", "train.max_minutes", "train.patience", "train.global_batch",
          "train.micro_batch", "train.ema_decay", "evaluation.")  # fmt: skip


def changed_for_resume(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Settings in which `now` cannot go on with a run that was started with `before`: key -> (old, new)."""
    old, new = flatten(before), flatten(now)
    kept = [key for key in new if key.startswith(RESUME) and key not in (*NEUTRAL, *START)]
    return {key: (old[key], new[key]) for key in kept if old[key] != new[key]}


def recipe_settings(config: Config) -> dict[str, Any]:
    """The flattened settings that a comparable run must have too."""
    return {key: value for key, value in flatten(config).items() if key.startswith(RECIPE) and key not in NEUTRAL}
