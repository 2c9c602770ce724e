"""Which ZeRO stage `train.zero_stage: auto` stands for. Pure; never fails."""

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
