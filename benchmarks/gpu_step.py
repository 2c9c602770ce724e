"""The training part of `benchmarks.gpu`: the engine's own step of r50_deformable, two images, without Ray.

It measures wall time and images/s, the GPU's busy time, launched kernels, the host's waits for the GPU, memory, and the
slowest kernels. It also measures the cost of the first and second step of a size that is new.
"""

import collections
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.model import PRESET, random_batch
from pipeline.config import Precision, load_config
from pipeline.engine.backend import PlainBackend
from pipeline.engine.cpu_tuning import tune_model
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.model import build_criterion, build_model
from pipeline.model.compiled import compile_regions
from pipeline.runtime import single

IMAGES = 2
SMALLER = (8, 11)  # pixels by which height and width of each new size differ
SLOWEST = 15  # kernels that are named


@dataclass(frozen=True)
class Variant:
    """How a step is computed."""

    precision: Precision
    op: str = "auto"
    channels_last: bool = False
    compile: bool = False
    preset: str = "r50_deformable"  # in jobs/configs


VARIANTS = {
    "grid_sample_fp32": Variant("fp32", op="torch"),
    "fp32": Variant("fp32"),
    "bf16": Variant("bf16"),
    "bf16_channels_last": Variant("bf16", channels_last=True),
    "bf16_compile": Variant("bf16", compile=True),
    "bf16_gpu_preset": Variant("bf16", preset="r50_deformable_gpu"),
    "bf16_gpu_preset_compile": Variant("bf16", preset="r50_deformable_gpu", compile=True),
    "bf16_channels_last_compile": Variant("bf16", channels_last=True, compile=True),
}


def measure_step(
    variant: Variant,
    size: tuple[int, int],
    steps: int,
    device: str = "cuda",
    new_sizes: int = 0,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Measure whole optimizer steps.

    Args:
        variant: how.
        size: height and width of the images, in pixels.
        steps: how many are timed, after three that warm up.
        device: where.
        new_sizes: how many sizes are tried that the step has not seen.
        overrides: of the preset, as on the command line.
    """
    cuda = device == "cuda"
    engine = _engine(variant, device, overrides)
    numbers = iter(range(10**6))

    def step(height: int, width: int) -> float:
        batch = random_batch(IMAGES, height, width)
        batch = batch.pin_memory() if cuda else batch
        start = time.perf_counter()
        engine.train_step([batch], next(numbers))
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = step(*size)
    for _ in range(2):
        step(*size)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(step(*size) for _ in range(steps))
    row: dict[str, Any] = {**asdict(variant), "size": list(size), "first_s": first}
    row |= {"ms": 1e3 * seconds, "images_s": IMAGES / seconds}
    if cuda:
        row["mib_per_image"] = torch.cuda.max_memory_allocated() / 2**20 / IMAGES
        row["waits"] = waits(lambda: step(*size))
        row |= _profile(lambda: step(*size))
    row["new_sizes_ms"] = []
    for number in range(1, new_sizes + 1):
        height, width = (side - number * less for side, less in zip(size, SMALLER, strict=True))
        row["new_sizes_ms"].append([1e3 * step(height, width) for _ in range(2)])
    return row


def _engine(variant: Variant, device: str, overrides: tuple[str, ...]) -> Engine:
    torch.manual_seed(0)
    config = load_config(
        PRESET.with_stem(variant.preset), [f"model.op={variant.op}", "model.backbone.weights=none", *overrides]
    )
    model = build_model(config.model, load_backbone=False).to(device)
    if variant.channels_last:
        model = model.to(memory_format=torch.channels_last)
    tune_model(model, config.train.model_copy(update={"cpu_tuning": False}), torch.device(device))
    if variant.compile:
        compile_regions(model)
    train = config.train
    criterion = build_criterion(config.loss)
    module = LossModule(model, criterion, variant.precision, train.cast_weights_once, train.fold_norms)
    runtime = single(device)
    backend = PlainBackend(module, config.optim, runtime.device)
    return Engine(module, backend, runtime, seed=0, delay=train.delay_results)


def waits(function: Callable[[], Any]) -> dict[str, int]:
    """How often `function` makes the host wait for the GPU, by the project's line that does; `?` elsewhere."""
    found: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            frames = [frame for frame in traceback.extract_stack() if "/pipeline/" in frame.filename]
            place = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "?"
            found[place] += 1

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return dict(found)


def _profile(function: Callable[[], Any]) -> dict[str, Any]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
    kernels = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    slowest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:SLOWEST]
    return {
        "gpu_busy_ms": sum(event.self_device_time_total for event in kernels) / 1e3,
        "launches": sum(event.count for event in kernels),
        "kernels_ms": {event.key[:80]: event.self_device_time_total / 1e3 for event in slowest},
    }
