"""`python -m benchmarks.model`: a training step of r50_deformable against the published code's way on the CPU.

Three variants run, each in its own process, so that its peak memory can be measured. `published` samples by grid_sample
and leaves linear layers and the allocator to torch, as the published code does. `torch` is this project with
model.op=torch, `auto` this project with its defaults. The step is the engine's: forward, losses with matching,
backward, clipping, AdamW. It prints the seconds of the median step, the peak resident memory, and the ratios to
`published`. `benchmarks.presets` measures the other presets.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from jobs.cli import CommandParser, Parser, main
from pipeline.config import load_config
from pipeline.data.batch import Batch
from pipeline.engine.backend import PlainBackend
from pipeline.engine.cpu_tuning import KEEP_FREED_MEMORY, tune_model
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.errors import ConfigError
from pipeline.model import build_criterion, build_model
from pipeline.runtime import single

PRESET = Path(__file__).parents[1] / "jobs" / "configs" / "r50_deformable.yaml"
PUBLISHED = "published"
VARIANTS = {PUBLISHED: "torch", "torch": "torch", "auto": "auto"}  # and their model.op
OBJECTS = 8  # per image
LIMIT = 3600  # seconds for one variant


def random_batch(images: int, height: int, width: int, classes: int = 80) -> Batch:
    """Noise with random boxes."""
    generator = torch.Generator().manual_seed(0)
    boxes = 0.2 + 0.3 * torch.rand(images * OBJECTS, 4, generator=generator)
    return Batch(
        images=torch.randint(0, 256, (images, 3, height, width), generator=generator, dtype=torch.uint8),
        mask=torch.zeros(images, height, width, dtype=torch.bool),
        boxes_cxcywh=boxes,
        labels=torch.randint(classes, (len(boxes),), generator=generator),
        target_offsets=torch.arange(images + 1) * OBJECTS,
        image_ids=torch.arange(images),
        sizes=torch.tensor([[height, width]]).repeat(images, 1),
        group=0,
        weight=1.0,
    )


def measure(variant: str, height: int, width: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the median step after one that warms up, peak memory in MiB, and the loss of the first step."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = load_config(PRESET, [f"model.op={VARIANTS[variant]}", "model.backbone.weights=none", *args.set])
    module = LossModule(build_model(config.model), build_criterion(config.loss), "bf16" if args.bf16 else "fp32")
    runtime = single()
    if variant != PUBLISHED:
        tune_model(module.model, config.train, runtime.device)
    engine = Engine(module, PlainBackend(module, config.optim, runtime.device), runtime, seed=0)
    batch = random_batch(args.images, height, width)
    seconds, losses = [], []
    for step in range(args.steps + 1):
        start = time.perf_counter()
        losses.append(engine.train_step([batch], step).losses["loss"])
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": peak, "loss": losses[0]}


def in_process(variant: str, size: str, argv: list[str]) -> dict[str, float] | None:
    """`measure` in its own process; None if that died, for example without enough memory."""
    command = [sys.executable, "-m", "benchmarks.model", *argv, "--sizes", size, "--only", variant]
    environment = {**os.environ, **({} if variant == PUBLISHED else KEEP_FREED_MEMORY)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False, env=environment)
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser(
        "benchmarks.model", __doc__.splitlines()[0], "python -m benchmarks.model --sizes 640x640 800x1333"
    )
    parser.add_argument("--sizes", nargs="+", default=["640x640"], help="height x width; default %(default)s")
    parser.add_argument("--images", type=int, default=1, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="timed ones; default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--bf16", action="store_true", help="autocast, as train.precision=bf16")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config, for all variants")
    parser.add_argument("--only", choices=VARIANTS, help="measure this one here and print it as JSON")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    try:
        sizes = {size: tuple(int(part) for part in size.split("x")) for size in args.sizes}
        pairs = {size: (height, width) for size, (height, width) in sizes.items()}
    except ValueError:
        raise ConfigError(f"--sizes {' '.join(args.sizes)}: write sizes such as 640x640") from None
    if args.only:
        for height, width in pairs.values():
            print(json.dumps(measure(args.only, height, width, args)))
        return 0
    argv = ["--images", str(args.images), "--steps", str(args.steps), "--threads", str(args.threads)]
    argv += [*(["--bf16"] if args.bf16 else []), *(["--set", *args.set] if args.set else [])]
    setup = {"torch": torch.__version__, "images": args.images, "threads": args.threads, "bf16": args.bf16}
    print(f"r50_deformable, one training step; {setup}\n")
    print("| size | variant | seconds | peak MiB | time, published over it | memory, it over published |")
    print("|---|---|---|---|---|---|")
    results: list[dict[str, Any]] = []
    for size in pairs:
        base: dict[str, float] | None = None
        for variant in VARIANTS:
            result = in_process(variant, size, argv)
            base = result if variant == PUBLISHED else base
            row = {"size": size, "variant": variant, **(result or {"failed": True})}
            cells = ["no result (out of memory?)", "", "", ""]
            if result:
                cells = [f"{result['seconds']:.2f}", f"{result['peak_mib']:.0f}", "", ""]
            if result and base:
                row["speedup"] = base["seconds"] / result["seconds"]
                row["memory_ratio"] = result["peak_mib"] / base["peak_mib"]
                cells[2:] = [f"{row['speedup']:.2f}", f"{row['memory_ratio']:.2f}"]
            results.append(row)
            print(f"| {' | '.join([size, variant, *cells])} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"setup": setup, "results": results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
