"""What to change when training does not fit into memory, and how such an error is recognised. Pure; never fails.

The same advice ends an out-of-memory error, `--probe` and the plan of `--dry-run`.
"""

import torch

from pipeline.config import Config
from pipeline.errors import MemoryFullError

ALLOCATOR = ("can't allocate memory", "not enough memory", "CUDA out of memory")  # torch's texts in a RuntimeError


def memory_advice(config: Config, on_gpu: bool) -> str:
    """The settings that save most, in the order in which to try them; the first costs no accuracy.

    Args:
        config: of the run, `train.micro_batch` a number.
        on_gpu: whether its workers use GPUs.
    """
    train, model, augment = config.train, config.model, config.data.augment
    choices = []
    if train.pad_group > 1:
        smaller = max(size for size in range(1, train.pad_group) if train.global_batch % size == 0)
        choices.append(f"train.micro_batch={smaller} (now {train.pad_group})")
    if model.name in ("deformable_detr", "detr") and not model.checkpoint_encoder:
        choices.append("model.checkpoint_encoder=true (slower)")
    if on_gpu and train.precision == "fp32":
        choices.append("train.precision=bf16")
    if config.scaling.num_workers > 1 and train.zero_stage in (0, "auto"):
        choices.append("train.zero_stage=1")
    if model.init_from and "backbone" not in model.freeze:
        choices.append("model.freeze=[backbone]")
    if on_gpu and not train.offload_optimizer and train.zero_stage in (1, 2, 3):
        choices.append("train.offload_optimizer=true (slower)")
    if not on_gpu and config.data.workers:
        choices.append(f"data.workers=0 (now {config.data.workers})")
    side = max(augment.scales)
    choices.append(f"smaller images: data.augment.scales=[{3 * side // 4}] and data.augment.max_size below "
                   f"{augment.max_size}")  # fmt: skip
    return "; or ".join(choices)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python found no memory."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATOR))


def memory_error(config: Config, on_gpu: bool, error: BaseException) -> MemoryFullError:
    """The error for a worker that ran out of memory."""
    what = "the GPU's memory" if on_gpu else "this machine's memory"
    first = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return MemoryFullError(f"training does not fit into {what} ({first}); set {memory_advice(config, on_gpu)}")
