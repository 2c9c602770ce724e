"""Which ZeRO stage `train.zero_stage: auto` stands for, and what it turns off. Pure; never fails."""

from pipeline.config import TrainConfig

BYTES_PER_NUMBER = 16  # fp32 weight, gradient and two moments
SMALL_BYTES = 8 * 10**9  # below it dividing saves little, and DeepSpeed's bookkeeping costs over a thousand launches


def resolve_stage(train: TrainConfig, trainable: int) -> int:
    """The stage of a run whose model has `trainable` parameters to train.

    `auto` is 0 if what ZeRO divides takes less than SMALL_BYTES on every worker and nothing is offloaded, else 1.
    """
    if train.zero_stage != "auto":
        return train.zero_stage
    return 0 if BYTES_PER_NUMBER * trainable < SMALL_BYTES and not train.offload_optimizer else 1


def stage_warning(train: TrainConfig, trainable: int) -> str:
    """A warning if `auto` is 1 for such a model and settings therefore do nothing; else an empty string."""
    idle = [f"train.{name}" for name in ("delay_results", "channels_last") if getattr(train, name)]
    if train.zero_stage != "auto" or not idle or resolve_stage(train, trainable) == 0:
        return ""
    reason = (
        "the optimizer is offloaded" if train.offload_optimizer else f"{trainable / 1e9:.1f} G parameters are trained"
    )
    return (
        f"train.zero_stage=auto is 1 here, because {reason}, so {' and '.join(idle)} do nothing. Set "
        "train.zero_stage=0 if the memory suffices, or leave them out"
    )
