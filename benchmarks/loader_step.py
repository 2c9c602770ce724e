"""`python -m benchmarks.loader_step`: a training step fed by the loader's own pool and by torch's DataLoader, in turns.

One process of one thread trains the demo (160 px) and r50_deformable (480x640) on drawn pictures. A loader of each of
`POOLS`, with the same order, feeds the same model. They take turns of some steps, so that what else goes on in the
machine hits all alike. Their first batches are compared bit for bit. Printed: the median over turns of DataLoader's
time over the pool's, its quartiles, and the same of the processor time of training process and workers together.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_chunks import POOLS, running_ms
from jobs.cli import CommandParser, Parser, main
from pipeline.config import Config, load_config
from pipeline.data.batch import ON_DEVICE, Batch
from pipeline.data.loader import TrainLoader
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic
from pipeline.engine.backend import PlainBackend
from pipeline.engine.cpu_tuning import KEEP_FREED_MEMORY, tune_model
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.model import build_criterion, build_model
from pipeline.runtime import single

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
TIMES = ("wall", "CPU")
CASES: dict[str, tuple[int, int, list[str]]] = {  # side of the drawn pictures, steps of a turn, settings
    "demo": (213, 10, []),
    "r50_deformable": (
        640,
        1,
        ["train.global_batch=1", "train.micro_batch=1", "data.augment.scales=[480]", "data.augment.max_size=640",
         "data.augment.crop=0", "model.backbone.weights=none", f"model.num_classes={len(CATEGORIES)}"],
    ),
}  # fmt: skip


class Loop:
    """A model with a loader of each pool."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(0)
        module = LossModule(build_model(config.model), build_criterion(config.loss))
        runtime = single()
        tune_model(module.model, config.train, runtime.device)
        self._engine = Engine(module, PlainBackend(module, config.optim, runtime.device), runtime, seed=0)
        self._steps, self._pools = {}, {}
        for name, kind in POOLS.items():
            pool = self._pools[name] = kind(config.data.workers)
            loader = TrainLoader(config.data, config.train, config.seed, 0, 1, pool)
            self._steps[name] = endless(loader)
        for first, *others in zip(*(next(steps) for steps in self._steps.values()), strict=True):
            for other in others:
                assert all(torch.equal(getattr(first, key), getattr(other, key)) for key in ON_DEVICE)

    def turn(self, name: str, steps: int) -> tuple[float, float]:
        """Wall and processor seconds of a step."""
        processes = [os.getpid(), *self._pools[name].processes()]
        before, start = sum(map(running_ms, processes)), time.perf_counter()
        for batches in itertools.islice(self._steps[name], steps):
            self._engine.train_step(batches, 0)
        wall = time.perf_counter() - start
        return wall / steps, (sum(map(running_ms, processes)) - before) / 1e3 / steps


def endless(loader: TrainLoader) -> Iterator[list[Batch]]:
    """Epoch after epoch."""
    return itertools.chain.from_iterable(map(loader.epoch, itertools.count()))


def measure(config: Config, steps: int, turns: int) -> dict[str, Any]:
    """Seconds of a step with the pool, and what it takes with the others over that. The first turns warm up."""
    loop = Loop(config)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in POOLS}
    for turn in range(turns + 1):
        for name in list(POOLS)[:: 1 if turn % 2 else -1]:
            times[name].append(loop.turn(name, steps))
    base, *others = POOLS
    found: dict[str, Any] = {"seconds": statistics.median(wall for wall, _ in times[base][1:])}
    for name in others:
        pairs = list(zip(times[base], times[name], strict=True))[1:]
        found[name] = {
            what: statistics.quantiles([b[at] / a[at] for a, b in pairs], n=4) for at, what in enumerate(TIMES)
        }
    return found


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.loader_step", __doc__.splitlines()[0], "python -m benchmarks.loader_step")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default %(default)s")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="default %(default)s")
    parser.add_argument("--turns", type=int, default=20, help="of each; default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    torch.set_num_threads(1)
    print("| case | data.workers | s per step, pool | variant | over it, wall (quartiles) | over it, CPU (quartiles) |")
    print("|---|---|---|---|---|---|")
    results = []
    for case, workers in itertools.product(args.cases, args.workers):
        side, steps, settings = CASES[case]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            build_shards(*write_synthetic(folder / "drawn", images=96, seed=0, size=side), folder / "shards")
            data = [f"data.train={folder / 'shards'}", f"data.workers={workers}"]
            found = measure(load_config(CONFIGS / f"{case}.yaml", [*settings, *data]), steps, args.turns)
        seconds = f"{found['seconds']:.3f}"
        for variant in list(POOLS)[1:]:
            cells = [f"{middle:.3f} ({low:.3f} to {high:.3f})" for low, middle, high in found[variant].values()]
            print(f"| {' | '.join([case, str(workers), seconds, variant, *cells])} |", flush=True)
        results.append({"case": case, "workers": workers, **found})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # as a worker on the CPU is started
        command = [sys.executable, "-m", "benchmarks.loader_step", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_FREED_MEMORY})
    sys.exit(main(build_parser(), run))
