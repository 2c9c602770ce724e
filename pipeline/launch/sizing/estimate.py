"""How long a run takes and how much memory a worker needs, from shapes and a quick look at this machine.

Operations and kept activations are counted on torch's meta device at the sizes that the first epoch really has; the
speed is that of a matrix product here and now. `sizing.probe` measures instead. Never fails on a run that passed
`preflight`; what cannot be counted is None.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.config import Config
from pipeline.data.index import ShardIndex
from pipeline.data.loader import TrainLoader
from pipeline.engine.memory import memory_advice
from pipeline.engine.stage import resolve_stage
from pipeline.evaluation.tta import eval_sizes_of
from pipeline.launch.preflight import GIB, CheckedRun, ModelSize
from pipeline.launch.sizing.free_memory import free_memory
from pipeline.model.footprint import training_footprint

BACKWARD = 2.0  # operations of the backward pass, as multiples of the forward pass
TEMPORARIES = 1.25  # peak over what is kept: gradients of activations, the matcher's costs, the allocator's gaps
# Share of a matrix product's speed that a training step reaches. CPU: measured with the demo and finetune_small;
# GPU: not measured here.
EFFICIENCY = {"cpu": 0.45, "cuda": 0.3}
PROCESS_BYTES = {"cpu": 0.9 * GIB, "cuda": 0.8 * GIB}  # a worker without model; on a GPU the context and libraries
LOW_PRECISION = 0.6  # of fp32's activations: coordinates, norms and losses stay fp32
PRODUCT_SIDE = {"cpu": 768, "cuda": 4096}
USABLE = 0.85  # of a machine's memory
SMALL_SECONDS = 120.0


@dataclass(frozen=True)
class Work:
    """What a run computes; sizes in pixels."""

    steps: int  # of the whole run
    global_batch: int
    evaluations: int
    eval_images: int  # of one evaluation, views counted
    largest: tuple[int, int]  # (height, width) of the largest pad group
    mean_area: float  # of padded training images
    eval_area: float  # of evaluated images


@dataclass(frozen=True)
class Estimate:
    """Of a whole run."""

    train_seconds: float
    eval_seconds: float
    step_seconds: float
    memory_bytes: float  # of one worker at its largest pad group
    available_bytes: float  # of one worker's share of this machine
    on_gpu: bool
    measured: bool = False

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.memory_bytes <= self.available_bytes

    def __str__(self) -> str:
        word = "measured" if self.measured else "estimated"
        where = "GPU memory" if self.on_gpu else "memory"
        return (
            f"{duration(self.train_seconds + self.eval_seconds)} ({word}: steps of {self.step_seconds:.3g} s, "
            f"evaluations {duration(self.eval_seconds)} in all); {self.memory_bytes / GIB:.1f} GiB {where} per worker "
            f"of {self.available_bytes / GIB:.1f} GiB here"
        )


def estimate_run(config: Config, val: ShardIndex, size: ModelSize, speed: float | None = None) -> Estimate | None:
    """Estimate time and memory; None for a detector whose work depends on the ground truth.

    Args:
        config: numbers resolved.
        val: index of `data.val`.
        size: of the model.
        speed: floating-point operations per second of one worker; None measures it.
    """
    on_gpu = uses_gpu(config)
    work = work_of(config, val)
    side = max(64, 32 * round(math.sqrt(work.mean_area) / 32))
    found = training_footprint(config.model, side, side)
    if found is None:
        return None
    per_pixel = found.operations / side**2
    speed = speed or measure_speed(config, on_gpu)
    step = per_pixel * work.mean_area * work.global_batch * (1 + BACKWARD) / (speed * config.scaling.num_workers)
    evaluation = per_pixel * work.eval_area * work.eval_images / (speed * config.scaling.num_workers)
    kept = found.kept_bytes / side**2 * math.prod(work.largest) * config.train.pad_group
    kept *= LOW_PRECISION if config.train.precision != "fp32" else 1.0
    memory = PROCESS_BYTES["cuda" if on_gpu else "cpu"] + TEMPORARIES * kept + state_bytes(config, size)
    seconds = step * work.steps
    return Estimate(seconds, evaluation * work.evaluations, step, memory, available_memory(config, on_gpu), on_gpu)


def describe_run(checked: CheckedRun) -> str:
    """The estimate of a run that passed all checks, as one line."""
    config = checked.config
    try:
        return describe(config, estimate_run(config, checked.val, checked.size))
    except RuntimeError as error:  # of torch; the workers may still find what was not found here
        return f"no estimate: {str(error).partition(chr(10))[0]}"
    finally:
        torch.cuda.empty_cache()


def describe(config: Config, estimate: Estimate | None) -> str:
    """The estimate as one line, with advice if it does not fit."""
    if estimate is None:
        return f"no estimate for model.name={config.model.name}, whose work depends on what it finds; --probe measures"
    if estimate.fits:
        return str(estimate)
    return f"{estimate}: it will probably not fit; set {memory_advice(config, estimate.on_gpu)}"


def work_of(config: Config, val: ShardIndex) -> Work:
    """Steps, evaluations and image sizes of a run, those of its first epoch."""
    data, settings = config.data, config.train
    padded = plan_loader(config).padded_sizes(0)
    per_epoch = len(padded)
    steps = min(per_epoch * settings.epochs, settings.max_steps or per_epoch * settings.epochs)
    epochs = math.ceil(steps / per_epoch)
    area = padded.prod(axis=2)
    views = eval_sizes_of(config.evaluation, data.augment)
    shorter, longer = np.sort(val.sizes(), axis=1).T
    scale = np.minimum(data.augment.eval_size / shorter, data.augment.max_size / longer)
    images = min(len(val), config.evaluation.max_images or len(val)) * len(views)
    largest = padded.reshape(-1, 2)[int(area.argmax())]
    return Work(
        steps,
        settings.global_batch,
        math.ceil(epochs / settings.eval_epochs),
        images,
        (int(largest[0]), int(largest[1])),
        float(area.mean()),
        float((shorter * longer * scale**2).mean()) if len(val) else 0.0,
    )


def plan_loader(config: Config, rank: int = 0) -> TrainLoader:
    """A loader of the run that decodes in this process."""
    data = config.data.model_copy(update={"workers": 0})
    return TrainLoader(data, config.train, config.seed, rank, config.scaling.num_workers)


def state_bytes(config: Config, size: ModelSize) -> float:
    """Bytes of weights, gradients, moments and average on one worker, by the ZeRO stage."""
    world, stage = config.scaling.num_workers, resolve_stage(config.train, size.trained)
    weights = size.parameters / (world if stage == 3 else 1)
    gradients = size.trained / (world if stage >= 2 else 1)
    moments = 0 if config.train.offload_optimizer else 2 * size.trained / (world if stage >= 1 else 1)
    average = size.parameters if config.train.ema_decay else 0
    return 4 * (weights + gradients + moments + average)


def uses_gpu(config: Config) -> bool:
    """Whether the run would use GPUs on this machine."""
    return config.scaling.use_gpu is not False and torch.cuda.is_available()


def available_memory(config: Config, on_gpu: bool) -> float:
    """Bytes that one worker can use: its GPU's, or its share of what this machine has free."""
    if on_gpu:
        return USABLE * float(torch.cuda.get_device_properties(0).total_memory)
    return USABLE * free_memory() / config.scaling.num_workers


def measure_speed(config: Config, on_gpu: bool) -> float:
    """Floating-point operations per second that a training step of one worker reaches, from a matrix product."""
    kind = "cuda" if on_gpu else "cpu"
    dtype = torch.float32 if config.train.precision == "fp32" or not on_gpu else torch.bfloat16
    side = PRODUCT_SIDE[kind]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)) if not on_gpu else threads)
    try:
        a = torch.ones(side, side, device=kind, dtype=dtype)
        best = math.inf
        for _ in range(4):  # the first one starts threads and libraries
            start = time.perf_counter()
            float((a @ a)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return EFFICIENCY[kind] * 2 * side**3 / best


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3.4 h`."""
    if seconds < SMALL_SECONDS:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
