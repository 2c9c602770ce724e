"""`python -m benchmarks.presets`: time and memory of a training and an evaluation step of every preset.

Every preset runs in its own process, so that its peak memory can be measured. A training step is the engine's: forward,
losses with matching, backward, clipping, AdamW. An evaluation step is the forward pass of one view and the selection of
boxes. Weights and images are random. It prints the best of the timed steps, the memory above the idle process, and the
ratios to r50_deformable. It runs on the GPU if there is one.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.model import LIMIT, random_batch
from jobs.cli import CommandParser, Parser, main
from jobs.table import CONFIGS
from pipeline.config import Config, override
from pipeline.data.batch import Batch
from pipeline.engine.backend import PlainBackend
from pipeline.engine.cpu_tuning import tune_model
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.errors import ConfigError
from pipeline.model import build_criterion, build_model
from pipeline.model.postprocess import postprocess
from pipeline.presets.rows import find_presets, select
from pipeline.runtime import single

BASE = "r50_deformable"
PARTS = ("train", "eval")


def measure(config: Config, batch: Batch, steps: int) -> dict[str, float]:
    """Seconds and MiB of both steps, each after one that warms up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    idle = _peak(device)
    torch.manual_seed(0)
    model = build_model(config.model).to(device)
    tune_model(model, config.train, device)
    moved = batch.to(device)

    @torch.no_grad()
    def evaluate() -> None:
        postprocess(model(moved.images, moved.mask), moved.sizes)[0]["scores"].cpu()  # waits for the device

    model.eval()
    result = {"eval_seconds": _best(evaluate, steps), "eval_mib": _peak(device) - idle}
    module = LossModule(model, build_criterion(config.loss), config.train.precision)
    backend = PlainBackend(module, config.optim, device, config.train.precision)
    engine = Engine(module, backend, single(device.type), seed=0)

    def train() -> None:
        engine.train_step([batch], 0)

    return {**result, "train_seconds": _best(train, steps), "train_mib": _peak(device) - idle}


def _best(step: Callable[[], None], steps: int) -> float:
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _peak(device: torch.device) -> float:
    """Peak memory so far in MiB, of the process or on the GPU; evaluation is therefore measured first."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_process(preset: str, argv: list[str]) -> dict[str, float] | None:
    """`measure` in its own process; None if that died, for example without enough memory."""
    command = [sys.executable, "-m", "benchmarks.presets", preset, *argv, "--alone"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser(
        "benchmarks.presets", __doc__.splitlines()[0], "python -m benchmarks.presets r50_detr --size 480x640"
    )
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="these alone (default: all)")
    parser.add_argument("--size", default="256x320", help="height x width; default %(default)s")
    parser.add_argument("--images", type=int, default=1, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="timed ones of each kind; default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of every preset's config")
    parser.add_argument("--alone", action="store_true", help="measure one preset here and print it as JSON")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    try:
        height, width = (int(side) for side in args.size.split("x"))
    except ValueError:
        raise ConfigError(f"--size {args.size}: write a size such as 256x320") from None
    chosen = list(select(find_presets(CONFIGS), args.presets))
    if args.alone:
        torch.set_num_threads(args.threads)
        config = override(find_presets(CONFIGS)[chosen[0]], ["model.backbone.weights=none", *args.set])
        batch = random_batch(args.images, height, width, config.model.classes)
        print(json.dumps(measure(config, batch, args.steps)))
        return 0
    argv = ["--size", args.size, "--images", str(args.images), "--steps", str(args.steps)]
    argv += ["--threads", str(args.threads), *(["--set", *args.set] if args.set else [])]
    setup = {"torch": torch.__version__, "size": args.size, "images": args.images, "threads": args.threads}
    print(f"one step; {setup}; ratios to {BASE}\n")
    print("| preset | train s | ratio | train MiB | ratio | eval s | ratio | eval MiB | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    base: dict[str, float] | None = None
    results: list[dict[str, Any]] = []
    for preset in [BASE, *(name for name in chosen if name != BASE)]:
        found = in_process(preset, argv)
        base = found if preset == BASE else base
        results.append({"preset": preset, **(found or {"failed": True})})
        print(f"| {preset} | {' | '.join(_cells(found, base))} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"setup": setup, "results": results}, indent=1) + "\n", encoding="utf-8")
    return 0


def _cells(found: dict[str, float] | None, base: dict[str, float] | None) -> list[str]:
    if found is None:
        return ["no result (out of memory?)", *[""] * 7]
    cells = []
    for part in PARTS:
        for key, form in ((f"{part}_seconds", ".2f"), (f"{part}_mib", ".0f")):
            cells += [format(found[key], form), format(found[key] / base[key], ".2f") if base else ""]
    return cells


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
