"""The preset and its settings for a data set and a machine. Pure; never fails.

Few images need few steps, whatever the epochs: the epochs follow from a number of steps. Only what depends on data or
machine is chosen here; the rest stands in the preset, and `key=value` of the user comes last.
"""

import math
from dataclasses import dataclass

GPU_GIB = 11.0  # from this memory on a ResNet-50 at 640 px trains well
SMALL_BATCH, SMALL_STEPS = 8, 400  # finetune_small: 10 minutes on two cores
R50_BATCH, R50_STEPS = 16, 3000
EPOCHS = (8, 100)
EVALUATIONS = 40  # at most, so that they stay short beside the training
CPU_WORKERS = 4  # each holds the model; more gain little at this batch


@dataclass(frozen=True)
class Machine:
    """What a run can use here."""

    cores: int
    gpus: int
    gpu_gib: float  # of the smallest GPU; 0 without one


@dataclass(frozen=True)
class Choice:
    """A preset by name, `key=value` settings over it, and the reason in a few words."""

    preset: str
    settings: tuple[str, ...]
    reason: str


def choose(images: int, machine: Machine, preset: str = "") -> Choice:
    """Choose for `images` training images.

    Args:
        images: of the training split.
        machine: of this process.
        preset: the user's own; only epochs and workers are chosen then, if it is one of the two here.
    """
    name = preset or preset_for(machine)
    if name not in ("finetune_r50", "finetune_small"):
        return Choice(name, workers(machine, R50_BATCH), "your own preset")
    batch, steps = (R50_BATCH, R50_STEPS) if name == "finetune_r50" else (SMALL_BATCH, SMALL_STEPS)
    batch = min(batch, largest_power(max(1, images // 4)))
    per_epoch = math.ceil(images / batch)
    epochs = min(EPOCHS[1], max(EPOCHS[0], round(steps / per_epoch)))
    settings = [f"train.global_batch={batch}", f"train.epochs={epochs}"]
    if (every := math.ceil(epochs / EVALUATIONS)) > 1:
        settings.append(f"train.eval_epochs={every}")
    where = f"{machine.gpus} GPUs of {machine.gpu_gib:.0f} GiB" if machine.gpus else f"{machine.cores} cores, no GPU"
    return Choice(name, (*settings, *workers(machine, batch)), f"{images:,} training images, {where}")


def preset_for(machine: Machine) -> str:
    """The name of the preset that suits the machine."""
    return "finetune_r50" if machine.gpus > 0 and machine.gpu_gib >= GPU_GIB else "finetune_small"


def workers(machine: Machine, batch: int) -> tuple[str, ...]:
    """One worker for each GPU; else for each core, at most CPU_WORKERS, and none without images in a step."""
    count = machine.gpus or min(CPU_WORKERS, machine.cores)
    return (f"scaling.num_workers={max(1, min(count, batch))}",)


def largest_power(number: int) -> int:
    """The largest power of two that is not above `number`."""
    return 1 << (number.bit_length() - 1)
